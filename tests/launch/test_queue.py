"""What Slurm says of a job, and what follows where it says nothing: a guard that cannot know
refuses.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hfscale.errors import CheckpointError
from hfscale.monitor import fence
from launch import run_dir
from launch.queue import ASKED, TOLD, facts, hold, refuse_holder

ANSWERS = (
    f"\n{ASKED}7\nJobId=7 JobName=a b\n   JobState=RUNNING Reason=None\n"
    f"\n{ASKED}8\nslurm_load_jobs error: Invalid job id specified\n"
    f"\n{ASKED}9\nslurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
)


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))


def test_no_answer_is_not_an_answer(monkeypatch: pytest.MonkeyPatch):
    assert facts("") == {}
    assert facts("7") is None, "there is no Slurm here"
    monkeypatch.setenv(TOLD, ANSWERS)
    told = facts("7")
    assert told is not None and told["JobState"] == "RUNNING"
    assert facts("8") == {}, "forgotten"
    assert facts("9") is None, "the controller is down"
    assert facts("10") is None, "nobody has asked"


def test_who_does_not_know_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "job").write_text("7")
    with pytest.raises(CheckpointError, match="does not answer") as refused:
        refuse_holder(tmp_path)
    assert f"rm {tmp_path}/job" in str(refused.value)
    with (
        pytest.raises(CheckpointError, match="does not answer"),
        run_dir.locked(tmp_path),
    ):
        pass
    with pytest.raises(CheckpointError, match="does not answer"):
        hold(tmp_path, "11")
    assert (tmp_path / "job").read_text() == "7"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    refuse_holder(tmp_path)  # it is this job


@pytest.mark.parametrize(("code", "free"), [(0, True), (2, True), (75, False), (77, False)])
def test_a_job_that_has_said_that_it_ended_for_good_holds_nothing(
    tmp_path: Path, code: int, free: bool
):
    """Where Slurm is not: a run directory that was copied to another machine."""
    (tmp_path / "job").write_text("7")
    fence.take(tmp_path, job="7").end(code)
    if free:
        refuse_holder(tmp_path)
    else:
        with pytest.raises(CheckpointError, match="does not answer"):
            refuse_holder(tmp_path)


def test_an_older_attempt_never_requeues_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It would end the younger one, which is the same job."""
    from launch import script

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    older = fence.take(tmp_path, job="7")
    older.tell(75, 0)
    assert script.end(tmp_path, 143, older.number) == (75, "scontrol requeue 7")
    fence.take(tmp_path, job="7", restart=1)
    assert script.end(tmp_path, 143, older.number) == (75, "")
    assert script.main("end", "0", "2", str(tmp_path)) == ["exit 0"]


def test_a_container_asks_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from launch import script

    def unanswered(*_: object) -> None:
        refuse_holder(tmp_path)

    (tmp_path / "job").write_text("7")
    monkeypatch.setattr(script, "begin", unanswered)
    monkeypatch.setenv(TOLD, f"\n{ASKED}11\nJobId=11 JobState=RUNNING")
    assert script.main("begin", "config.yaml") == ["ask 7"]
    monkeypatch.setenv(TOLD, f"\n{ASKED}7\nUnable to contact slurm controller")
    with pytest.raises(CheckpointError, match="does not answer"):
        script.main("begin", "config.yaml")
    monkeypatch.delenv(TOLD)
    with pytest.raises(CheckpointError, match="does not answer"):
        script.main("begin", "config.yaml")
