"""The test cluster: its nodes are nodes, and nothing of it outlives the tests."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import ROOT
from tests.helpers.needs import lacking
from tests.helpers.slurm import Cluster, missing, processes_of, wait_for

pytestmark = pytest.mark.slow
SESSION = """
import time
from tests.helpers.slurm import Cluster
cluster = Cluster()
job = cluster.sbatch("--nodes=2", "--mem=10", "--output=/dev/null", "--wrap", "srun sleep 100")
cluster.wait(job, ("RUNNING",))
print(cluster.folder, flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def _may_run() -> None:
    if reason := missing():
        lacking(reason)


def test_nodes_have_names_gpus_and_reach_each_other():
    cluster = Cluster()
    try:
        job = cluster.sbatch(
            "--nodes=2",
            "--gpus-per-node=2",
            "--mem=10",
            f"--output={cluster.folder}/out",
            "--wrap",
            "srun sh -c 'hostname; echo gpus $CUDA_VISIBLE_DEVICES; getent hosts n1 n2 n3 n4 | "
            "wc -l'",
        )
        assert cluster.wait(job) == "COMPLETED"
        assert sorted(cluster.output(job).split("\n")) == [
            "",
            "4",
            "4",
            "gpus 0,1",
            "gpus 0,1",
            "n1",
            "n2",
        ]
    finally:
        cluster.stop()
    assert not cluster.folder.exists()
    assert processes_of(cluster.folder) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_session_that_dies(number: signal.Signals):
    command = [sys.executable, "-c", SESSION]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as session:
        assert session.stdout is not None
        folder = Path(session.stdout.readline().strip())
        # daemons; and the job with its steps, which start after it
        wait_for(lambda: len(processes_of(folder)) > 6 + 4)
        session.send_signal(number)
        session.wait(60)
    wait_for(lambda: not folder.exists() and not processes_of(folder))
