"""Where the time of a run went, from the files of attempts whose clock is known."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hfscale.errors import CheckpointError, DataError
from hfscale.monitor.fence import Fence, take
from hfscale.reports import goodput, hours

T0 = 1_700_000_000.0
START = {"start/imports": 4.0, "start/model": 2.0}


def attempt(
    run: Path,
    number: int,
    *,
    at: float,
    ended: tuple[float, int] | None,
    job: str = "",
    queued: float = 0.0,
) -> None:
    """Write an attempt that began at ``at`` seconds and ended so; its job began at ``queued``."""
    fence = take(run, job=job)
    assert fence.number == number
    owner = json.loads((fence.folder / "owner.json").read_text())
    owner |= {"at": T0 + at, "submitted": T0 if job else 0.0, "job_began": T0 + queued}
    (fence.folder / "owner.json").write_text(json.dumps(owner))
    if ended:
        end = {"time": "then", "code": ended[1], "at": T0 + ended[0]}
        (fence.folder / "ended").write_text(json.dumps(end))


def mark(run: Path, attempt: int, step: int, *, began: float, at: float, **phases: float) -> None:
    line = {
        "attempt": attempt,
        "step": step,
        "began": T0 + began,
        "time": T0 + at,
        "phases": START | phases,
    }
    with open(run / "goodput.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def test_two_attempts_of_a_job_the_first_of_which_was_killed(tmp_path: Path):
    attempt(tmp_path, 1, at=12, ended=(60, 137), job="7", queued=10)
    mark(tmp_path, 1, 0, began=13, at=19)
    mark(tmp_path, 1, 1, began=13, at=24, data=1.0, forward=4.0)  # the first step: 3 s too long
    mark(tmp_path, 1, 20, began=13, at=44, data=2.0, forward=23.0)
    mark(tmp_path, 1, 30, began=13, at=55, data=2.0, forward=33.0, save=1.0)
    attempt(tmp_path, 2, at=71, ended=(100, 0), job="7", queued=70)
    mark(tmp_path, 2, 20, began=72, at=78)
    mark(tmp_path, 2, 21, began=72, at=80, forward=2.0)
    mark(tmp_path, 2, 31, began=72, at=90, forward=12.0)
    times = goodput.ledger(tmp_path)
    parts = times.parts()
    assert times.seconds == 100 and sum(parts.values()) == pytest.approx(100)
    assert parts["queue"] == 10 + 10
    # 30 - 20 steps, and what came after the last mark
    assert parts["lost work"] == pytest.approx(11 + 5)
    assert times.start() == pytest.approx(
        {
            "job script": 2 + 1,
            "launch": 1 + 1,
            "imports": 8,
            "model": 4,
            "first batch": 1.0,
            "first step": 3.0 + 1.0,
        },
        abs=0.11,
    )
    assert parts["data stall"] == 1.0
    assert parts["shutdown"] == 10
    assert times.goodput() == parts["compute"] / 100
    assert times.goodput(held=True) == parts["compute"] / 80
    text = "\n".join(hours.describe(times))
    assert "in 2 attempts" in text and "lost work" in text


def test_what_a_run_that_went_back_in_one_attempt_did_again_is_lost(tmp_path: Path):
    attempt(tmp_path, 1, at=0, ended=(30, 0))
    for step, at in ((0, 6), (1, 7), (10, 16), (5, 20), (10, 25)):
        mark(tmp_path, 1, step, began=0, at=at, forward=at - 6.0)
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000010" / "manifest.json").write_text("{}")
    parts = goodput.ledger(tmp_path).parts()
    assert parts["lost work"] == pytest.approx(5.0)
    assert sum(parts.values()) == pytest.approx(30)


def test_a_run_whose_marks_are_gone_is_not_told_a_wrong_number(tmp_path: Path):
    attempt(tmp_path, 1, at=0, ended=(9, 0))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match="nothing says what it did when"):
        goodput.ledger(tmp_path)


def test_an_attempt_that_was_killed_with_its_launcher_is_not_under_way(tmp_path: Path):
    attempt(tmp_path, 1, at=0, ended=None)
    owner = tmp_path / "attempts" / "1" / "owner.json"
    content = json.loads(owner.read_text())
    assert Fence(tmp_path, 1).under_way()
    owner.write_text(json.dumps({**content, "launcher": "local", "pid": 2**22 + 1}))
    os.utime(owner, (T0 + 20, T0 + 20))
    mark(tmp_path, 1, 0, began=0, at=6)
    mark(tmp_path, 1, 1, began=0, at=7, forward=1.0)
    assert not Fence(tmp_path, 1).under_way()
    parts = goodput.ledger(tmp_path, now=T0 + 1000).parts()
    # 13 s behind the last mark, and the step that nothing has saved
    assert parts == pytest.approx({"start-up": 6, "lost work": 14})


def test_an_attempt_under_way_and_one_that_never_trained(tmp_path: Path):
    attempt(tmp_path, 1, at=0, ended=(9, 2))
    attempt(tmp_path, 2, at=20, ended=None)
    mark(tmp_path, 2, 0, began=20, at=26)
    parts = goodput.ledger(tmp_path, now=T0 + 40).parts()
    assert parts == pytest.approx({"between attempts": 11, "start-up": 9 + 6, "not marked yet": 14})


def test_a_run_without_times_and_a_damaged_mark(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nothing here says when this run began"):
        goodput.ledger(tmp_path)
    attempt(tmp_path, 1, at=0, ended=(9, 0))
    mark(tmp_path, 1, 0, began=0, at=6)
    with open(tmp_path / "goodput.jsonl", "a") as file:
        file.write('{"attempt": 1, "step": "many"}\n{"attempt": 1, "st')  # the last one is torn
    with pytest.raises(DataError, match=r"damaged[\s\S]*goodput.jsonl:2"):
        goodput.ledger(tmp_path)
