"""Runs from Python through submitit: on a real Slurm cluster without accounting, on this machine,
and in this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import submitit
import yaml

from hfscale.errors import CheckpointError, ConfigError
from hfscale.reports.status import last_record
from launch.job import Training
from launch.request import Request
from launch.submit import launch, submit, submit_sweep
from tests.helpers.cli import ROOT
from tests.helpers.corpus import run_values
from tests.helpers.slurm import Cluster, wait_for

NOTEBOOK = """
from launch.submit import Rank, submit
job = submit({config!r}, ["run.name=here"], cluster="debug")
print(job.result()["done"], job.result()["step"])
import os
assert "RANK" not in os.environ
"""


@pytest.fixture
def config(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asks = {"allow_local_disk": True, "time": 10, "sbatch": {"oversubscribe": True, "mem": 100}}
    values = run_values(
        corpus,
        tmp_path / "runs",
        "run",
        cluster=asks,
        train={"steps": 3, "global_batch": 4, "micro_batch": 2},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "config.yaml")


@pytest.fixture
def on_slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    return cluster


def finished(job: submitit.Job[dict[str, Any]]) -> dict[str, Any]:
    wait_for(
        lambda: job.done(force_check=True),
        timeout_s=300,
        every_s=0.5,
        what=lambda: f"{job.state}\n{job.stdout()}\n{job.stderr()}",
    )
    return job.results()[0]


@pytest.mark.slow
def test_on_slurm(config: str, on_slurm: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEP_S", "0.3")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests/launch/faults:{ROOT}")
    with monkeypatch.context() as patch:
        patch.setenv("FAULT", "loader sleeps")
        hung = submit(config, ["train.steps=8", "run.name=hung", "train.hang_timeout_s=3"], nodes=2)
    warned = submit(config, ["train.steps=30", "run.name=warned"], nodes=2)
    cancelled = submit(config, ["train.steps=100000", "run.name=cancelled"])
    waiting = submit(config, ["cluster.sbatch.hold=true", "run.name=waiting"])
    runs = Path(config).parent / "runs"
    with pytest.raises(CheckpointError, match=f"job {warned.job_id}"):
        submit(config, ["train.steps=30", "run.name=warned"], nodes=2)
    with pytest.raises(ConfigError, match="cannot be cut"):
        submit(config, nodes=3)
    with pytest.raises(ConfigError, match="Slurm refuses the job: .*invalid partition"):
        submit(config, ["run.name=nowhere"], slurm_partition="nope")
    sweep = submit_sweep(config, {"optim.lr": [0.01, 0.001], "optim.clip_norm": [1.0]})
    assert [job.job_id.partition("_")[2] for job in sweep] == ["0", "1"], "one array"

    wait_for(
        lambda: last_record(runs / "warned").get("step", 0) >= 2,
        what=lambda: f"{warned.stdout()}{warned.stderr()}",
    )
    # what submitit's --signal sends; to one rank, the ranks agree
    os.kill(on_slurm.ranks(warned.job_id)[1], signal.SIGUSR2)
    results = [finished(job) for job in sweep]
    assert [Path(result["run_dir"]).name for result in results] == [
        "run-lr_0.01-clip_norm_1.0",
        "run-lr_0.001-clip_norm_1.0",
    ]
    assert all(result["done"] and result["step"] == 3 for result in results)
    assert results[0]["loss"] != results[1]["loss"]

    cancelled.cancel()
    waiting.cancel()
    result = finished(warned)
    assert (result["done"], result["step"], result["attempt"]) == (True, 30, 2)
    assert on_slurm.job(warned.job_id)["Restarts"] == "1"
    assert len((runs / "warned" / "metrics.jsonl").read_text().splitlines()) == 30, (
        "no step was made twice"
    )
    assert warned.num_tasks == 2

    result = finished(hung)
    assert (result["done"], result["step"], result["attempt"]) == (True, 8, 2)
    assert (runs / "hung" / "hangs" / "1" / "report.json").exists()

    on_slurm.wait(cancelled.job_id)
    assert cancelled.state == "CANCELLED", (
        "it was running, has saved, and did not go back into the queue"
    )
    # with submitit alone this waits for ever
    with pytest.raises(submitit.core.utils.UncompletedJobError, match="CANCELLED"):
        finished(waiting)


def test_from_the_command_line(config: str, on_slurm: Cluster, capsys: pytest.CaptureFixture[str]):
    held = ("cluster.sbatch.hold=true",)
    run = Path(config).parent / "runs" / "run"
    assert launch(Training(Request(config, held, dry_run=True))) == 0
    assert (
        "AutoExecutor(cluster='slurm').update_parameters(name='run', tasks_per_node=1"
        in capsys.readouterr().out
    )
    assert not run.exists()
    assert launch(Training(Request(config, held))) == 0
    out, job = capsys.readouterr().out, (run / "job").read_text()
    assert f"scancel {job}" in out
    assert f"hfscale status {run}" in out
    assert on_slurm.state(job) == "PENDING"
    on_slurm.run("scancel", job)
    with pytest.raises(ConfigError, match="from the cluster"):
        launch(Training(Request(config, held, procs=2)))


@pytest.mark.slow
def test_on_this_machine(config: str):
    job = submit(config, cluster="local", tasks_per_node=2)
    with pytest.raises(ConfigError, match="must be divisible by num_heads"):  # before it is a job
        submit(config, ["run.name=bad", "model.config.n_head=3"], cluster="local")
    result = finished(job)
    assert (result["done"], result["step"]) == (True, 3)


@pytest.mark.slow
def test_from_a_notebook_in_this_process(config: str):
    """The callable is found by its module's name, wherever it is called from."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK.format(config=config)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["True 3"], done.stderr


def test_no_slurm_on_this_machine(config: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(ConfigError, match="no Slurm on this machine"):
        submit(config)
