"""One rank as its own process: signals while it starts, and what it leaves for the job around
it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGUSR1

import pytest
import yaml

from hfscale.monitor import fence
from tests.helpers.cli import ROOT
from tests.helpers.corpus import run_values

SCRIPT = (ROOT / "slurm" / "train.sbatch").read_text()
[LATER] = re.findall(r"^later='(.*)'$", SCRIPT, re.MULTILINE)
PYTHON = sys.executable
RANK = [PYTHON, "-I", "-S", "-c", LATER, PYTHON, "-u", "-m", "hfscale.worker"]  # as in that script


def start(folder: Path, corpus: Path, **sections: object) -> subprocess.Popen[bytes]:
    values = run_values(
        corpus,
        folder.parent,
        folder.name,
        train={"steps": 100_000, "global_batch": 4, "micro_batch": 2},
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(values | sections))
    attempt = fence.take(folder)
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "SLURM_JOB_ID": "7",
        "HFSCALE_ATTEMPT": str(attempt.number),
    }
    return subprocess.Popen(
        [*RANK, str(folder / "config.yaml")],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_rank_that_is_warned_while_it_starts_saves_after_its_first_step(
    corpus: Path, tmp_path: Path
):
    rank, deadline = start(tmp_path, corpus), time.monotonic() + 90
    time.sleep(0.3)  # it holds the signal back
    while rank.poll() is None and time.monotonic() < deadline:
        rank.send_signal(SIGUSR1)  # at every moment of its start
        time.sleep(0.05)
    assert rank.wait(1) == 75
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert (tmp_path / "attempts" / "1" / "exit_code").read_text() == "75 0\n", (
        "for the job's script: srun tells the code of those it killed then"
    )


@pytest.mark.slow
def test_one_signal_while_python_starts_is_not_lost(corpus: Path, tmp_path: Path):
    rank = start(tmp_path, corpus)
    time.sleep(0.3)
    rank.send_signal(SIGUSR1)  # once, long before anybody listens
    assert rank.wait(90) == 75
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_the_first_that_leaves_is_the_one_that_is_told(corpus: Path, tmp_path: Path):
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    (tmp_path / "attempts" / "1" / "exit_code").write_text("1 5\n")
    first = fence.Fence(tmp_path, 1)
    rank = start(tmp_path, corpus, model={"architecture": "no_such_model"})
    assert rank.wait(60) == 2
    assert first.told() == (1, 5)
    second = fence.Fence(tmp_path, 2)
    assert second.told() == (2, 0), "an older attempt's file is its own"
    assert second.ended() == 2, "without a launcher, rank 0 writes the end"
    second.tell(1, 3)
    assert second.told() == (2, 0)


def test_a_config_that_does_not_lie_in_its_run_directory_is_refused(corpus: Path, tmp_path: Path):
    """`torchrun -m hfscale.worker CONFIG`: heartbeats and checkpoints would lie in two places."""
    (tmp_path / "elsewhere").mkdir()
    rank = start(tmp_path / "elsewhere", corpus, run={"root": str(tmp_path), "name": "run"})
    assert rank.wait(60) == 2
    assert rank.stderr is not None
    said = rank.stderr.read().decode()
    assert "does not lie in its run directory" in said and "hfscale pretrain" in said
    assert not (tmp_path / "run").exists()
