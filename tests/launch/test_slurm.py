"""The Slurm launcher on a real cluster: what it submits, what it refuses, who holds a run
directory, and an interactive allocation.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale import log
from hfscale.checkpoint import layout
from hfscale.dist.world import allocation
from hfscale.errors import CheckpointError, ConfigError
from launch import attempt, local, script, slurm, start
from launch.job import Training
from launch.queue import seconds
from launch.request import Request
from tests.helpers.cli import ROOT, hfscale
from tests.helpers.corpus import run_values
from tests.helpers.slurm import GPUS, Cluster, wait_for

SMALL = {"oversubscribe": True, "mem": 100, "ntasks-per-node": 2}


@pytest.fixture
def config(corpus: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of one step for this cluster, whose clients are reached from this process too."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asks = {"nodes": 1, "allow_local_disk": True, "sbatch": SMALL}
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            run_values(
                corpus,
                tmp_path / "runs",
                "run",
                cluster=asks,
                train={"steps": 1, "global_batch": 4, "micro_batch": 2},
            )
        )
    )
    return path


def submit(config: Path, *overrides: str, **options: Any) -> int:
    log.setup()
    return slurm.launch(Training(Request(str(config), overrides, **options)))


def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
):
    assert (
        submit(
            config,
            "cluster.time=1:00:00",
            "cluster.partition=normal",
            "cluster.sbatch.comment=two words",
            dry_run=True,
        )
        == 0
    )
    out, err = capsys.readouterr()
    [line] = out.splitlines()
    run = config.parent / "runs" / "run"
    assert line.startswith(f"cd {run}/code/1 && ")
    words = shlex.split(line.partition(" && ")[2])
    assert words[:2] + words[-2:] == ["sbatch", "--parsable", "slurm/train.sbatch", str(run)]
    assert {
        "--job-name=run",
        "--nodes=1",
        "--partition=normal",
        "--time=1:00:00",
        "--signal=USR1@300",
        "--oversubscribe",
        "--mem=100",
        "--comment=two words",
    } <= set(words)
    assert "to start at" in err, "Slurm was asked"
    assert not run.exists()


REFUSALS = {
    "an unknown partition": (
        ["cluster.partition=nope"],
        "invalid partition specified: nope",
        "this cluster has low",
    ),
    "more GPUs than a node has": (
        [f"cluster.gpus_per_node={GPUS + 1}"],
        "Requested node configuration is not available",
        f"gpu:{GPUS}",
    ),
    "more nodes than there are": (
        ["cluster.nodes=9", "train.global_batch=36"],
        "node configuration is not available",
        "4 nodes",
    ),
    "an account that is refused": (
        ["cluster.account=overdrawn"],
        "Invalid account",
        "this cluster has",
    ),
    "an unknown option": (
        ["cluster.sbatch.colour=red"],
        "unrecognized option '--colour=red'",
        "this cluster has",
    ),
    "a limit shorter than the warning": (
        ["cluster.time=5"],
        "leaves no time to train",
        "ask for more",
    ),
    "a limit that is none": (["cluster.time=soon"], "cluster.time", "soon"),
    "a run directory of this node alone": (
        ["cluster.allow_local_disk=false"],
        "other nodes do not see",
        "run.root",
    ),
    "an option that would hide a lost node": (
        ["cluster.sbatch.no-kill=true"],
        "lost a node",
        "take it out",
    ),
    "fewer nodes of a number of tasks": (
        ["cluster.min_nodes=1"],
        "the fewest nodes at once",
        "take cluster.sbatch.ntasks-per-node out",
    ),
    "an uneven batch": (["cluster.nodes=3"], "cannot be cut", "world_size"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_anything_is_written(config: Path, name: str):
    overrides, what, remedy = REFUSALS[name]
    with pytest.raises(ConfigError, match=what) as refused:
        submit(config, *overrides)
    assert remedy in str(refused.value)
    assert not (config.parent / "runs" / "run").exists()


def test_a_job_that_would_never_start_is_told(config: Path, capsys: pytest.CaptureFixture[str]):
    assert submit(config, "cluster.time=2:00:00", dry_run=True) == 0
    assert (
        "notice: a partition with a limit of 1:00:00 never starts a job of 2:00:00"
        in capsys.readouterr().err
    )


def test_ranks_are_the_clusters_business(config: Path):
    with pytest.raises(ConfigError, match="from the cluster"):
        submit(config, procs=2)


def test_a_time_limit_shorter_than_a_save_that_was_measured(config: Path):
    run = config.parent / "runs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.read_text())
    record = {"step": 1, "step_s": 10.0, "save_s": 900.0, "loss": 1.0, "attempt": 1}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ConfigError, match="step and save take 910 s"):
        submit(config, "cluster.time=15")
    assert any(
        "better cluster.signal_s=1820" in line
        for line in start.time_to_save(Training(Request(str(config))))
    )


def test_no_slurm_on_this_machine(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    with pytest.raises(ConfigError, match="no Slurm on this machine"):
        submit(config)
    assert submit(config, dry_run=True) == 0
    assert "nobody was asked" in capsys.readouterr().err


def test_a_log_that_cannot_be_written(config: Path):
    run = config.parent / "runs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.read_text())
    (run / "logs").write_text("a file")
    with pytest.raises(ConfigError, match="no log can be written here"):
        submit(config)


def test_the_hubs_cache_must_be_seen_by_the_nodes(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="other nodes do not see") as refused:
        submit(
            config,
            "cluster.allow_local_disk=false",
            f"run.root={Path.home()}/runs",
            "tokenizer.path=gpt2",
        )
    assert "HF_HOME" in str(refused.value)


@pytest.mark.slow
def test_one_job_holds_a_run_directory(
    config: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
):
    run = config.parent / "runs" / "run"
    assert submit(config, "cluster.sbatch.hold=true") == 0
    out = capsys.readouterr().out
    job = (run / "job").read_text()
    assert out.startswith(f"job {job}: 2 ranks on 1 nodes")
    assert f"hfscale logs {run} -f" in out
    assert (next((run / "code").iterdir()) / "hfscale" / "worker.py").read_text() == (
        ROOT / "hfscale" / "worker.py"
    ).read_text()
    with pytest.raises(CheckpointError, match="another Slurm job holds") as refused:
        submit(config)
    assert f"scancel {job}" in str(refused.value)
    with pytest.raises(CheckpointError, match=f"job {job}"):
        local.launch(Training(Request(str(config))))
    # by hand
    second = cluster.sbatch(
        "--oversubscribe",
        "--ntasks-per-node=2",
        "--mem=100",
        f"--output={config.parent}/second.log",
        "slurm/train.sbatch",
        config,
        cwd=ROOT,
        env=os.environ,
    )
    bare = cluster.sbatch(
        "--oversubscribe",
        "--mem=100",
        f"--output={config.parent}/bare.log",
        "--wrap",
        f"srun {sys.executable} -m hfscale.worker {run}/config.yaml",
        cwd=ROOT,
        env=os.environ,
    )
    assert cluster.wait(bare) == "FAILED"
    assert f"'job {job}'" in cluster.output(bare)
    assert cluster.wait(second) == "FAILED"
    assert cluster.job(second)["ExitCode"] == "2:0"
    assert f"job {job}" in cluster.output(second)
    told = hfscale("status", run).stdout
    assert f"{job} PENDING, because of JobHeldUser" in told
    assert "none was logged yet" in told

    cluster.run("scontrol", "release", job)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    attempts = json.loads((run / "environment.json").read_text())
    assert [attempt["job"] and attempt["job"]["job_id"] for attempt in attempts] == [None, job], (
        "the submission and the job"
    )
    told = hfscale("status", run).stdout
    assert f"{job} COMPLETED, on n" in told
    assert "last checkpoint step 1" in told
    assert "expected end    done" in told
    assert "step 1/1" in hfscale("logs", run).stdout
    # it ended, so another one may hold it
    cancelled = slurm.launch(
        Training(Request(str(run), ("train.steps=2", "cluster.sbatch.hold=true")))
    )
    assert cancelled == 0
    cluster.run("scancel", (run / "job").read_text())


@pytest.mark.slow
def test_in_an_interactive_allocation_the_allocation_wins(config: Path, cluster: Cluster):
    said = cluster.run(
        "salloc",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--mem=100",
        "--oversubscribe",
        sys.executable,
        "-m",
        "launch.cli",
        "pretrain",
        config,
        "--launcher",
        "slurm",
        env=os.environ,
        timeout_s=300,
    )
    assert "the allocation has nodes 2, not the 1 of cluster.nodes" in said
    assert "0: " in said, "output is labelled with the rank"
    assert "step 1/1" in said
    assert "step-00000001" in os.listdir(config.parent / "runs" / "run" / "checkpoints")


@pytest.mark.slow
def test_what_ends_a_job_for_good(config: Path, cluster: Cluster):
    """scancel; and a signal where requeueing is off: both save, and neither job comes back."""
    runs = config.parent / "runs"
    for name, more in (("cancelled", ()), ("signalled", ("cluster.sbatch.no-requeue=true",))):
        submit(config, "train.steps=100000", f"run.name={name}", *more)
    job = {name: (runs / name / "job").read_text() for name in ("cancelled", "signalled")}
    for name in job:
        wait_for(
            (runs / name / "metrics.jsonl").exists, what=lambda name=name: cluster.output(job[name])
        )
    cluster.run("scancel", job["cancelled"])
    cluster.run("scancel", "--signal=USR1", job["signalled"])
    assert cluster.wait(job["cancelled"]) == "CANCELLED"
    assert cluster.wait(job["signalled"]) == "FAILED"
    assert cluster.job(job["signalled"])["ExitCode"] == "75:0", cluster.output(job["signalled"])
    for name in job:
        wait_for(lambda name=name: any((runs / name / "checkpoints").glob("step-????????")))
    wait_for(lambda: cluster.run("squeue", "-h").strip() == "")
    assert {cluster.state(number) for number in job.values()} == {"CANCELLED", "FAILED"}


def test_a_job_gives_up_after_too_many_restarts_that_came_no_further(config: Path):
    wanted = Training(Request(str(config), ("cluster.max_restarts=2",)))
    wanted.folder.mkdir(parents=True)

    def start(number: str) -> None:
        here = allocation({"SLURM_JOB_ID": number})
        assert here is not None
        attempt.take(wanted, here)

    def save(step: int) -> None:
        folder = wanted.folder / "checkpoints" / layout.step_name(step)
        folder.mkdir(parents=True)
        (folder / layout.MANIFEST).touch()

    for _ in range(3):
        start("1")
    save(10)
    for _ in range(3):
        start("1")
    with pytest.raises(
        ConfigError, match="job 1 was restarted 3 times without getting beyond step-00000010"
    ):
        start("1")
    start("2")  # a person has submitted it again
    assert hfscale("--help", check=False, env={"SLURM_JOB_ID": "1"}).returncode == 0, (
        "the environment alone disturbs nothing"
    )


def test_nodes_to_leave_out_and_fewer_nodes(config: Path):
    asked = ("cluster.nodes=4", "train.global_batch=16")
    fewer = (
        *asked,
        "cluster.min_nodes=2",
        "cluster.sbatch.exclude=n9",
        "cluster.sbatch.ntasks-per-node=null",
    )
    wanted = Training(Request(str(config), fewer))
    wanted.folder.mkdir(parents=True)
    (wanted.folder / "excluded_nodes.txt").write_text("n2 hung 2 times\n\nn3 has a bad GPU\n")
    assert {"--nodes=2-4", "--exclude=n9,n2,n3"} <= {*slurm.sbatch_options(wanted, config.parent)}
    assert [wanted.usable_nodes(nodes, 2) for nodes in (4, 3, 2)] == [4, 2, 2], (
        "a batch of 16 does not divide among three nodes"
    )
    assert Training(Request(str(config), asked)).usable_nodes(3, 2) == 3, (
        "nobody allowed fewer: then the batch is refused"
    )
    with pytest.raises(ConfigError, match="cannot be cut .* on 6 ranks"):
        submit(
            config,
            *asked,
            "cluster.min_nodes=3",
            "cluster.sbatch.ntasks-per-node=null",
            "cluster.gpus_per_node=2",
        )


def test_a_worker_outside_of_a_job_has_nothing_to_begin(config: Path):
    with pytest.raises(ConfigError, match="this is not a Slurm job"):
        script.begin(str(config), [])


@pytest.mark.parametrize(
    ("limit", "value"),
    [("90", 5400), ("1:30", 90), ("1:30:00", 5400), ("2-12", 216000), ("1-0:30", 88200)],
)
def test_time_limits_as_slurm_writes_them(limit: str, value: int):
    assert seconds(limit) == value
