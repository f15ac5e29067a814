"""Slurm as sites have it: whole nodes, containers without its commands, a prolog that prints,
options of an outer allocation, a controller that is down at the wrong moment. Everything lies on a
path with a space.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hfscale.errors import CheckpointError
from launch import attempt, local, queue
from launch.job import Training
from launch.request import Request
from tests.helpers.cli import ROOT
from tests.helpers.corpus import run_values
from tests.helpers.slurm import Cluster, wait_for

SMALL = ("--oversubscribe", "--mem=100")
ASK = """from hfscale.dist.world import allocation
from launch.queue import cores_per_rank, ranks_per_node
here = allocation()
print("ranks", ranks_per_node(here), "cores", cores_per_rank(here, ranks_per_node(here)))"""
OUTER = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NTASKS": "1", "SLURM_GPUS_PER_NODE": "1"}
RANKS = {  # what is asked for -> ranks and cores of each on a node with 8 cores and 2 GPUs
    "--nodes=1 --exclusive --mem=0": "ranks 2 cores 4",
    "--nodes=1 --exclusive --mem=0 --gpus-per-node=1": "ranks 1 cores 8",
    "--nodes=1 --gpus-per-node=2 --oversubscribe --mem=100": "ranks 2 cores 1",
    "--nodes=1 --gres=gpu:2 --oversubscribe --mem=100": "ranks 2 cores 1",
    "--nodes=1 --ntasks=3 --oversubscribe --mem=100": "ranks 3 cores 1",
    "--nodes=2 --ntasks-per-node=2 --cpus-per-task=3 --mem=100": "ranks 2 cores 3",
    "--nodes=2 --ntasks=3 --mem=100": "ranks must be equally many on each node",
}


@pytest.fixture
def lab(
    corpus: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A config, and a checkout whose site has a container without Slurm's commands."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    lab = tmp_path / "my lab"
    code, image = lab / "hfscale", lab / "image"
    for folder in (*attempt.PACKAGES, "slurm"):
        shutil.copytree(ROOT / folder, code / folder)
    image.mkdir()
    for name in ("sh", "cat", "uname", "git"):
        (image / name).symlink_to(f"/usr/bin/{name}")
    (image / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (image / "python").chmod(0o755)
    site = code / "slurm" / "site.sh"
    container = f"CONTAINER=(/usr/bin/env {shlex.quote(f'PATH={image}')})"
    site.write_text(
        f'echo "$UNBOUND" > /dev/null\n{site.read_text()}'.replace("CONTAINER=()", container, 1)
    )
    asks = {"nodes": 1, "allow_local_disk": True}
    train = {"steps": 2, "global_batch": 4, "micro_batch": 2}
    values = run_values(corpus, lab / "runs", "run", cluster=asks, train=train)
    (lab / "config.yaml").write_text(yaml.safe_dump(values))
    return lab / "config.yaml", code


def test_ranks_are_those_that_were_asked_for(cluster: Cluster, tmp_path: Path):
    """Also where sbatch hands on what an outer allocation was asked for."""
    wrap = f"{sys.executable} -c {shlex.quote(ASK)}"
    env = cluster.env | OUTER | {"PYTHONPATH": str(ROOT)}
    jobs = {
        asked: cluster.sbatch(
            *asked.split(), f"--output={tmp_path}/%j", "--wrap", wrap, cwd=ROOT, env=env
        )
        for asked in RANKS
    }
    for asked, job in jobs.items():
        cluster.wait(job)
        assert RANKS[asked] in (tmp_path / job).read_text(), asked


@pytest.mark.slow
def test_a_site_with_containers_whole_nodes_and_a_controller_that_is_down(
    lab: tuple[Path, Path], cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    config, code = lab
    runs, prolog = config.parent / "runs", config.parent / "prolog.sh"
    prolog.write_text("#!/bin/sh\necho print welcome to the cluster\n")
    prolog.chmod(0o755)
    faults = f"{ROOT}/tests/launch/faults:{code}"
    env = cluster.env | {"PYTHONPATH": faults, "STEP_S": "0.4"}

    def sbatch(
        name: str,
        *options: str,
        more: tuple[str, ...] = (),
        cwd: Path = code,
        **variables: str,
    ) -> str:
        return cluster.sbatch(
            *options,
            f"--output={config.parent}/%j.log",
            "slurm/train.sbatch",
            config,
            f"run.name={name}",
            *more,
            cwd=cwd,
            env=env | variables,
        )

    def said(job: str) -> str:
        return (config.parent / f"{job}.log").read_text(errors="replace")

    def steps(name: str) -> int:
        file = runs / name / "metrics.jsonl"
        return file.read_text().count("\n") if file.is_file() else 0

    long = ("train.steps=10000",)
    # the script's own options: a whole node, with fewer GPUs asked for than it has
    whole = sbatch("whole", "--nodelist=n3", "--gpus-per-node=1", more=long, cwd=ROOT)
    contained = sbatch(
        "contained", *SMALL, "--nodelist=n1", more=long, SLURM_TASK_PROLOG=str(prolog)
    )
    short = sbatch("short", *SMALL, "--nodelist=n4", "--time=5")
    wait_for(lambda: steps("contained") >= 2, what=lambda: said(contained))
    second = sbatch("contained", *SMALL, "--nodelist=n2")
    wait_for(lambda: steps("whole") >= 2, what=lambda: said(whole))
    assert "1 ranks on 1 of the nodes n3" in said(whole)
    assert "1 ranks on a node with 2 GPUs: the others stay idle" in said(whole)
    assert cluster.wait(short) == "FAILED"
    assert "the time limit leaves no time to train" in said(short)
    assert cluster.wait(second) == "FAILED"
    assert f"value:  'job {contained}'" in said(second), "asked outside of the container"
    assert json.loads((runs / "contained/attempts/1/owner.json").read_text())["job"] == contained

    cluster.stop_controller()
    try:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, cluster.env[name])
        monkeypatch.setattr(queue, "TIMEOUT_S", 5.0)
        with pytest.raises(CheckpointError, match="Slurm does not answer") as refused:
            local.launch(Training(Request(str(runs / "contained"), procs=1)))
        assert f"rm '{runs}/contained/job'" in str(refused.value)
        for rank in cluster.ranks(contained).values():
            os.kill(rank, signal.SIGUSR1)
        for rank in cluster.ranks(whole).values():
            os.kill(rank, signal.SIGUSR1)
        wait_for(lambda: "Unable to contact" in said(contained), what=lambda: said(contained))
        # what scontrol says of a requeue that nobody takes
        wait_for(lambda: "Unexpected message" in said(whole), what=lambda: said(whole))
    finally:
        cluster.start_controller()
    wait_for(lambda: cluster.job(contained).get("Restarts") == "1", what=lambda: said(contained))
    cluster.run("scancel", contained)


def test_started_by_srun_once_for_each_task(cluster: Cluster, tmp_path: Path):
    command = [sys.executable, "-m", "launch.cli", "pretrain", "nothing.yaml"]
    told = cluster.run(
        *("srun", "--nodes=2", "--oversubscribe", "--mem=100", *command),
        cwd=ROOT,
        env=cluster.env | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert told.count("srun started this command 2 times") == 2
    assert "--launcher slurm" in told


@pytest.mark.slow
def test_ctrl_c_in_an_allocation_saves(lab: tuple[Path, Path], cluster: Cluster):
    """Out of a shell of the allocation: one Ctrl-C reaches launcher, script and srun at once, and
    the ranks save.
    """
    config, _ = lab
    shell = subprocess.Popen(
        [
            *("salloc", "--nodes=1", "--ntasks-per-node=1", *SMALL, "setsid", "--wait"),
            *(sys.executable, "-m", "launch.cli", "pretrain", config),
            *("train.steps=10000", "--launcher", "slurm"),
        ],
        env=cluster.env | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    run = config.parent / "runs" / "run"
    wait_for((run / "metrics.jsonl").exists, what=lambda: str(shell.poll()))
    [launcher] = [
        pid
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if _words(pid)[1:3] == ["-m", "launch.cli"] and os.getsid(pid) == pid
    ]
    os.killpg(launcher, signal.SIGINT)
    out, _ = shell.communicate(timeout=60)
    assert "asking the ranks to save and stop" in out
    assert "exit code 75" in out or shell.returncode == 75, out
    assert any((run / "checkpoints").glob("step-????????"))


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []
