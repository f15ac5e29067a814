"""One rank as its own process: signals while it starts, and what it leaves for the job around it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGUSR1

import pytest
import yaml

from tests.helpers.cli import ROOT
from tests.helpers.corpus import run_values

LISTENING_LATER = [
    "sh",
    "-c",
    'trap "" USR1; exec "$@"',
    "sh",
    sys.executable,
    "-u",
    "-m",
    "hfscale.worker",
]  # as in slurm/train.sbatch


def start(folder: Path, corpus: Path, **sections: object) -> subprocess.Popen[bytes]:
    values = run_values(
        corpus,
        folder.parent,
        folder.name,
        train={"steps": 100_000, "global_batch": 4, "micro_batch": 2},
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(values | sections))
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_ID": "7"}
    return subprocess.Popen(
        [*LISTENING_LATER, str(folder / "config.yaml")],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_rank_that_is_warned_while_it_starts_saves_after_its_first_step(
    corpus: Path, tmp_path: Path
):
    rank, deadline = start(tmp_path, corpus), time.monotonic() + 90
    time.sleep(0.1)  # the shell has set its trap
    while rank.poll() is None and time.monotonic() < deadline:
        rank.send_signal(SIGUSR1)  # at every moment of its start
        time.sleep(0.05)
    assert rank.wait(1) == 75
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert (tmp_path / "exit_code").read_text() == "75 0\n", (
        "for the job's script: srun tells the code of those it killed then"
    )


def test_the_first_that_leaves_is_the_one_that_is_told(corpus: Path, tmp_path: Path):
    (tmp_path / "exit_code").write_text("1 5\n")
    assert start(tmp_path, corpus, model={"architecture": "no_such_model"}).wait(60) == 2
    assert (tmp_path / "exit_code").read_text() == "1 5\n"
