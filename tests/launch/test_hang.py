"""A run that stands still, on real ranks: who is to blame is found and named, stacks are written,
the run ends and can go on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.monitor.beats import Beat, read_beats
from hfscale.reports.status import last_record
from tests.helpers.cli import ROOT
from tests.helpers.corpus import run_values
from tests.helpers.slurm import wait_for

pytestmark = pytest.mark.slow


def start(
    corpus: Path, folder: Path, *, env: dict[str, str], steps: int = 100_000
) -> subprocess.Popen[str]:
    values = run_values(
        corpus,
        folder,
        "run",
        train={"steps": steps, "global_batch": 4, "micro_batch": 2, "hang_timeout_s": 3},
        checkpoint={"every_steps": 3},
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    env = (
        os.environ
        | {
            "PYTHONPATH": f"{ROOT}/tests/launch/faults:{ROOT}",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        | env
    )
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "pretrain", "config.yaml", "--procs", "2"],
        cwd=folder,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ended(launcher: subprocess.Popen[str], run: Path) -> tuple[str, dict[str, Any], list[Beat]]:
    """Return what was said, the report, and the last heartbeats of a run that hung."""
    out, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 77, out
    beats = read_beats(run, range(2))
    assert not any(Path(f"/proc/{beat.pid}").exists() for beat in beats), "no rank is left"
    return out, json.loads((run / "hangs/1/report.json").read_text()), beats


@pytest.fixture(scope="module")
def asleep(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A folder, and a launcher in it one of whose ranks falls asleep; it does so beside the first
    test.
    """
    folder = tmp_path_factory.mktemp("asleep")
    launcher = start(corpus, folder, env={"FAULT": "loader sleeps"}, steps=8)
    yield folder, launcher
    launcher.kill()


def test_a_rank_that_is_stopped(
    corpus: Path, tmp_path: Path, asleep: tuple[Path, subprocess.Popen[str]]
):
    run = tmp_path / "run"
    launcher = start(corpus, tmp_path, env={"STEP_S": "0.1"})
    wait_for(
        lambda: last_record(run).get("step", 0) >= 4 or launcher.poll() is not None, timeout_s=300
    )
    stopped = read_beats(run, [1])[0]
    os.kill(stopped.pid, signal.SIGSTOP)
    out, report, _ = ended(launcher, run)
    [odd] = report["odd"]
    assert (odd["rank"], odd["pid"], odd["node"]) == (1, stopped.pid, os.uname().nodename)
    assert odd["step"] >= stopped.step
    assert re.search(
        rf"no progress for \d+ s: rank 1 on {odd['node']} stands in \w+ of step {odd['step']} "
        rf"and does not answer; "
        r"the others: 1 in \w+ of step \d+",
        out,
    ), out
    assert "_step" in (run / "hangs/1/rank-0.txt").read_text(), "the loop, in the stacks"
    assert "agree_slowly" in (run / "hangs/1/rank-1-py-spy.txt").read_text(), "from outside"
    assert f"hfscale pretrain {run}" in out


def test_a_rank_asleep_in_the_loader_and_the_run_goes_on(
    corpus: Path, asleep: tuple[Path, subprocess.Popen[str]]
):
    folder, launcher = asleep
    run = folder / "run"
    out, report, beats = ended(launcher, run)
    assert [(odd["rank"], odd["phase"], odd["step"]) for odd in report["odd"]] == [(1, "data", 5)]
    assert [(beat.phase, beat.step) for beat in beats] == [("collective", 5), ("data", 5)]
    assert "rank 1 on" in out
    assert "in sleep" in (run / "hangs/1/rank-1.txt").read_text(), (
        "the stack of the loader's thread"
    )
    again = start(corpus, folder, env={}, steps=8)
    assert again.communicate(timeout=300)[0].count("resumed at step 3 of 8") == 1
    assert again.returncode == 0
