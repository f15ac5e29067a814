"""Attempts of a run: one number each, the older one writes nothing once a younger one has begun,
and a lease says who lives.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from hfscale.errors import EXIT_HUNG, CheckpointError, SupersededError, exit_code
from hfscale.monitor import fence
from hfscale.monitor.fence import Fence, newest, take
from hfscale.monitor.metrics_log import MetricsLog
from hfscale.monitor.writers.base import About
from hfscale.shards import files
from launch import run_dir
from tests.helpers.cli import ROOT

RECORD = {"step": 1, "loss": 1.0, "step_s": 1.0, "tokens_per_s": 1.0, "data_wait_s": 0.0}


def test_each_attempt_gets_a_number_of_its_own(tmp_path: Path):
    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(lambda _: take(tmp_path).number, range(64)))
    assert sorted(taken) == list(range(1, 65))
    (tmp_path / "hangs" / "90").mkdir(parents=True)
    assert take(tmp_path).number == 91, "a run of an older version has hung before"


def test_an_older_attempt_appends_nothing(tmp_path: Path):
    older = take(tmp_path, job="7", restart=0)
    log = MetricsLog(About(tmp_path, "run"), total_steps=9, fence=older)
    log.write(RECORD)
    take(tmp_path, job="7", restart=1)
    with pytest.raises(SupersededError, match=r"attempt 1 .* by attempt 2 \(.*job 7 \(restart 1\)"):
        log.write(RECORD | {"step": 2})
    with pytest.raises(SupersededError):
        MetricsLog(About(tmp_path, "run"), total_steps=9, fence=older)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_superseded_attempt_may_run_again(capsys: pytest.CaptureFixture[str]):
    assert exit_code(SupersededError("by attempt 2")) == EXIT_HUNG
    assert "by attempt 2" in capsys.readouterr().err


def test_ends_belong_to_an_attempt(tmp_path: Path):
    older, younger = take(tmp_path), take(tmp_path)
    older.tell(75, 1)
    older.tell(1, 0)
    assert (older.told(), younger.told()) == ((75, 1), None)
    older.end(75)
    assert (older.ended(), younger.ended()) == (75, None)


def test_an_end_says_when_and_how(tmp_path: Path):
    attempt = take(tmp_path, launcher="slurm", job="7", nodes="n[1-2]")
    assert attempt.ending() is None
    attempt.end(137)
    end, owner = attempt.ending(), attempt.owner()
    assert end is not None and (end.code, end.signal, end.closed_by) == (137, "SIGKILL", 0)
    assert owner is not None and (owner.job, owner.nodes) == ("7", "n[1-2]")
    assert owner.started <= end.time
    with pytest.raises(MemoryError), attempt.kept():
        raise MemoryError
    assert attempt.ended() == 2, "of an error that comes out, as the process ends with it"
    (attempt.folder / "ended").write_text("75\n")  # as version 0.1 wrote it
    old = attempt.ending()
    assert old is not None and (old.code, old.signal) == (75, "") and old.time >= end.time


KILLED = """
import sys, time
from pathlib import Path
from hfscale.monitor.fence import take
from hfscale.monitor.heartbeat import beat, watching
run = Path(sys.argv[1])
attempt = take(run, launcher="local")
watched = watching(run, rank=0, ranks=1, node="n1", timeout_s=60, on_hang=print, attempt=1)
with attempt.kept(), watched:
    beat("save", 7)
    while not (run / "heartbeats/rank-0").read_text().startswith("2 7 save"):
        time.sleep(0.05)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_the_next_start_closes_an_attempt_that_was_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    killed = Fence(tmp_path, 1)
    assert killed.ending() is None
    later = time.time() + 3600  # the machine was away for a while
    os.utime(tmp_path / "heartbeats" / "rank-0", (later - 5, later - 5))
    os.utime(killed.folder / "owner.json", (later - 6, later - 6))
    with caplog.at_level("INFO"):
        run_dir.take(tmp_path, launcher="local")
    end = killed.ending()
    assert end is not None and (end.code, end.doing, end.closed_by) == (None, "save of step 7", 2)
    assert datetime.fromisoformat(end.time).timestamp() == int(later - 5)
    assert f"attempt 1 of this run {end}" in caplog.text and "it was killed" in str(end)
    assert [file.name for file in sorted(killed.folder.iterdir())] == ["ended", "owner.json"]
    assert not (tmp_path / "heartbeats").exists(), "of the attempt that begins there are none yet"
    assert killed.ended() is None


def test_what_a_killed_attempt_left_is_told_with_its_end(tmp_path: Path):
    told, hung = take(tmp_path), take(tmp_path)
    told.tell(139, 3)
    (tmp_path / "hangs" / "2").mkdir(parents=True)
    (tmp_path / "hangs" / "2" / "report.json").write_text("{}")
    (told.folder / "ended").unlink()
    take(tmp_path)
    ends = [attempt.ending() for attempt in (told, hung)]
    assert [end and (end.code, end.signal) for end in ends] == [(139, "SIGSEGV"), (EXIT_HUNG, "")]


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock, as Lustre is without `-o flock`; leases are looked at for less
    long.
    """
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(files, "WATCH_S", 1.5)


def test_a_run_directory_without_locks_is_held_by_a_lease(tmp_path: Path, without_locks: None):
    with run_dir.locked(tmp_path):
        attempt = run_dir.take(tmp_path, launcher="local")
        with attempt.kept():
            with (
                pytest.raises(CheckpointError, match="another job is at work") as refused,
                run_dir.locked(tmp_path),
            ):
                pass
            assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
        attempt.end(0)
    with run_dir.locked(tmp_path):  # the older one has ended: nobody waits
        pass


def test_a_lease_that_nobody_renews_is_nobodys(
    tmp_path: Path, without_locks: None, monkeypatch: pytest.MonkeyPatch
):
    attempt = take(tmp_path)
    os.utime(attempt.folder / "owner.json", (time.time() + 3600,) * 2)  # of a clock that is ahead
    began = time.monotonic()
    assert not attempt.alive(watch_s=0.5)
    assert time.monotonic() - began >= 0.5
    monkeypatch.setattr(Fence, "alive", lambda self: False)
    with run_dir.locked(tmp_path):
        pass


def test_a_lock_that_does_not_reach_another_machine_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    attempt = take(tmp_path)
    with attempt.kept():
        with run_dir.locked(tmp_path):  # of this machine: its lock was free, so nobody lives
            pass
        monkeypatch.setattr(fence.socket, "gethostname", lambda: "elsewhere")
        with (
            pytest.raises(CheckpointError, match="another job is at work"),
            run_dir.locked(tmp_path),
        ):
            pass
        owner = attempt.owner()
        assert owner is not None
        monkeypatch.setattr(Fence, "owner", lambda self: replace(owner, job="7"))
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        with run_dir.locked(tmp_path):  # the same job, started anew: the older one is fenced off
            pass


def test_runs_of_older_versions_have_no_attempts(tmp_path: Path):
    assert newest(tmp_path) is None
    with run_dir.locked(tmp_path):
        pass


def test_files_are_locked_by_leases_where_there_are_no_locks(tmp_path: Path, without_locks: None):
    path, order = tmp_path / "lock", []
    with files.locked(path):
        with pytest.raises(BlockingIOError), files.locked(path, wait=False):
            pass
        waiting = threading.Thread(target=lambda: _enter(path, order))
        waiting.start()
        time.sleep(0.3)
        order.append("left")
    waiting.join(10)
    assert order == ["left", "entered"]
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    (tmp_path / "lock.lease").touch()  # of a process that was killed
    with files.locked(path, wait=False):
        pass


def _enter(path: Path, order: list[str]) -> None:
    with files.locked(path):
        order.append("entered")
