"""Interrupted in every way Slurm has, a run goes on by itself and comes to the numbers of one that
was left alone.

All jobs run at the same time on one real cluster; the first attempt of each has slow steps, to be
caught in the middle.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.monitor.fence import attempts
from hfscale.reports.goodput import HANG, LOST, QUEUE, START_UP, ledger
from launch import slurm
from launch.job import Training
from launch.request import Request
from tests.helpers.cli import ROOT, hfscale
from tests.helpers.corpus import run_values
from tests.helpers.slurm import ENDED, Cluster, wait_for

pytestmark = pytest.mark.slow
STEPS, STEP_S = 60, 1.0
EXACT = ("loss", "lr", "grad_norm", "batch_digest", "tokens_seen")
SMALL = {"oversubscribe": True, "mem": 100}  # several jobs share a node
# name -> nodes, ranks on each, and more of `cluster:`; Slurm warns half a minute before it should
WAYS = {
    "time limit": (1, 2, {"time": "3", "signal_s": 120, "sbatch": {"nodelist": "n1"}}),
    "signal": (2, 1, {"sbatch": {"nodelist": "n1,n2"}}),
    "requeue": (2, 1, {"signal_s": 1, "sbatch": {"nodelist": "n2,n3"}}),
    "preemption": (1, 2, {"partition": "low", "signal_s": 60, "sbatch": {"nodelist": "n4"}}),
    "killed rank": (1, 2, {"sbatch": {"nodelist": "n1"}}),
    "unhealthy": (1, 2, {"sbatch": {"nodelist": "n3"}}),
    # a fault of n2
    "hung twice": (
        2,
        1,
        {"gpus_per_node": 1, "min_nodes": 1, "sbatch": {"exclude": "n3,n4"}},
    ),
}

SAVES = {"checkpoint": {"every_minutes": None, "every_steps": 2}}
MORE = {
    "unhealthy": {"optim": {"lr": 1e30, "clip_norm": 0}},
    "requeue": SAVES,
    "killed rank": SAVES,
    "hung twice": SAVES,
}
FAULTS = {"hung twice": {"FAULT": "loader sleeps", "FAULT_NODE": "n2", "AT": "3"}}


@dataclass
class Jobs:
    cluster: Cluster
    folder: Path
    ids: dict[str, str]
    # seconds of the epoch between which each way was submitted
    submitted: dict[str, tuple[float, float]] = field(default_factory=dict)

    def run(self, way: str) -> Path:
        return self.folder / "runs" / way.replace(" ", "-")

    def records(self, way: str) -> list[dict[str, Any]]:
        file = self.run(way) / "metrics.jsonl"
        return (
            [json.loads(line) for line in file.read_text().split("\n")[:-1]]
            if file.exists()
            else []
        )

    def end(self, way: str) -> str:
        """Return the state in which a job ended."""
        return self.cluster.wait(self.ids[way])

    def log(self, way: str) -> str:
        return self.cluster.output(self.ids[way])


def write_config(corpus: Path, folder: Path, way: str, **sections: dict[str, Any]) -> Path:
    values = run_values(
        corpus,
        folder / "runs",
        way.replace(" ", "-"),
        train={"steps": STEPS, "global_batch": 16, "micro_batch": 4},
        metrics={"every_steps": 1, "tensorboard": way == "signal"},
        **sections,
    )
    path = folder / f"{way.replace(' ', '-')}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def jobs(
    cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Jobs]:
    """Every job, submitted and interrupted in its way; and ``whole``, the same run that nothing
    happened to.
    """
    folder = tmp_path_factory.mktemp("jobs")
    jobs = Jobs(cluster, folder, {})
    slow = {"PYTHONPATH": f"{ROOT}/tests/launch/faults:{ROOT}", "STEP_S": str(STEP_S)}
    for way, (nodes, ranks, more) in WAYS.items():
        tasks = {} if "min_nodes" in more else {"ntasks-per-node": ranks}
        asks = {
            "nodes": nodes,
            "allow_local_disk": True,
            **more,
            "sbatch": {**tasks, **SMALL, **more["sbatch"]},
        }
        config = write_config(corpus, folder, way, cluster=asks, **MORE.get(way, {}))
        short = ["train.steps=12", "train.hang_timeout_s=10"] if way in FAULTS else []
        before = time.time()
        # in this process, which imports what a check needs only once
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (cluster.env | slow | FAULTS.get(way, {})).items():
                patch.setenv(name, value)
            slurm.launch(Training(Request(str(config), tuple(short))))
        jobs.ids[way] = (jobs.run(way) / "job").read_text()
        jobs.submitted[way] = (before, time.time())
    for way in ("signal", "requeue", "preemption", "killed rank"):
        wait_for(
            lambda way=way: len(jobs.records(way)) >= 3,
            what=lambda way=way: cluster.output(jobs.ids[way]),
        )
    cluster.run("scancel", "--signal=USR1", jobs.ids["signal"])
    os.kill(cluster.ranks(jobs.ids["killed rank"])[1], signal.SIGKILL)
    cluster.run("scontrol", "requeue", jobs.ids["requeue"])
    jobs.ids["urgent"] = cluster.sbatch(
        "--partition=high",
        "--nodelist=n4",
        "--exclusive",
        "--mem=0",
        "--output=/dev/null",
        "--wrap=true",
    )
    hfscale("pretrain", write_config(corpus, folder, "whole"), "--procs", 2)
    yield jobs
    for job in jobs.ids.values():
        cluster.run("scancel", job, check=False)


def check_equal(jobs: Jobs, way: str) -> None:
    """The run that was interrupted made the steps of the one that was not, and ended with its
    weights.
    """
    whole = {record["step"]: [record[key] for key in EXACT] for record in jobs.records("whole")}
    assert {record["step"]: [record[key] for key in EXACT] for record in jobs.records(way)} == whole

    def digests(run: Path) -> dict[str, str]:
        files = json.loads((run / f"checkpoints/step-{STEPS:08}/manifest.json").read_text())[
            "files"
        ]
        return {
            file["path"]: file["sha256"] for file in files if file["path"].startswith("engine/")
        }

    assert digests(jobs.run(way)) == digests(jobs.run("whole"))


def test_a_signal_is_saved_requeued_and_resumed(jobs: Jobs):
    assert jobs.end("signal") == "COMPLETED", jobs.log("signal")
    check_equal(jobs, "signal")
    assert [record["step"] for record in jobs.records("signal")] == [*range(1, STEPS + 1)], (
        "a graceful stop repeats no step"
    )
    assert {record["attempt"] for record in jobs.records("signal")} == {1, 2}
    assert jobs.cluster.job(jobs.ids["signal"])["Restarts"] == "1"
    assert "stopped and saved; back into the queue" in jobs.log("signal")
    curve = curve_of(jobs.run("signal") / "tensorboard")
    assert curve == {
        record["step"]: pytest.approx(record["loss"]) for record in jobs.records("whole")
    }


def test_the_time_limit(jobs: Jobs):
    assert jobs.end("time limit") == "COMPLETED", jobs.log("time limit")
    check_equal(jobs, "time limit")
    steps = [record["step"] for record in jobs.records("time limit")]
    assert len(steps) == STEPS, "no step was lost"
    assert int(jobs.cluster.job(jobs.ids["time limit"])["Restarts"]) >= 1


def test_a_job_of_a_higher_partition_takes_the_node_and_gives_it_back(jobs: Jobs):
    assert jobs.cluster.wait(jobs.ids["urgent"]) == "COMPLETED"
    assert jobs.end("preemption") == "COMPLETED", jobs.log("preemption")
    check_equal(jobs, "preemption")
    assert len(jobs.records("preemption")) == STEPS, "it was warned, so no step was lost"
    assert int(jobs.cluster.job(jobs.ids["preemption"])["Restarts"]) >= 1


def test_a_requeue_by_hand(jobs: Jobs):
    assert jobs.end("requeue") == "COMPLETED", jobs.log("requeue")
    check_equal(jobs, "requeue")
    assert jobs.cluster.job(jobs.ids["requeue"])["Restarts"] == "1"
    repeated = {record["step"] for record in jobs.records("requeue") if record["attempt"] == 2}
    assert min(repeated) > 2, "it went on from a checkpoint"
    log = (jobs.run("requeue") / "logs" / "rank-0.log").read_text()
    said = len(re.findall(r"step and save take \d+ s, but Slurm warns 1 s before the end", log))
    assert 1 <= said <= 2, "once in each attempt whose steps take more than cluster.signal_s"


def test_a_killed_rank_takes_the_others_with_it_and_the_job_starts_again(jobs: Jobs):
    assert jobs.end("killed rank") == "COMPLETED", jobs.log("killed rank")
    check_equal(jobs, "killed rank")
    assert "a rank was killed from outside; back into the queue" in jobs.log("killed rank")
    assert jobs.cluster.job(jobs.ids["killed rank"])["Restarts"] == "1"
    killed, other = attempts(jobs.run("killed rank"))
    ends, owner = (killed.ending(), other.ending()), killed.owner()
    assert [end and (end.code, end.signal) for end in ends] == [(137, "SIGKILL"), (0, "")]
    assert owner is not None and (owner.job, owner.nodes) == (jobs.ids["killed rank"], "n1")


def test_unhealthy_numbers_are_not_requeued(jobs: Jobs):
    assert jobs.end("unhealthy") == "FAILED"
    assert jobs.cluster.job(jobs.ids["unhealthy"])["ExitCode"] == "76:0", jobs.log("unhealthy")
    assert jobs.cluster.job(jobs.ids["unhealthy"])["Restarts"] == "0"
    assert "unhealthy:" in jobs.log("unhealthy"), (
        "the job's log has the last lines of the rank that left first"
    )


def test_a_node_that_hangs_twice_is_left_out_by_a_successor_that_goes_on_with_fewer(jobs: Jobs):
    run = jobs.run("hung twice")
    ended = jobs.end("hung twice")
    first = jobs.cluster.job(jobs.ids["hung twice"])
    # n2 was busy when Slurm started it, or started it again: then min_nodes let it go on without n2
    if ended == "COMPLETED":
        assert first["NodeList"] == "n1" and jobs.records("hung twice")[-1]["step"] == 12, jobs.log(
            "hung twice"
        )
        return
    assert ended == "FAILED"
    assert (first["ExitCode"], first["Restarts"]) == ("77:0", "1"), jobs.log("hung twice")
    jobs.ids["successor"] = (run / "job").read_text().strip()
    assert jobs.ids["successor"] != jobs.ids["hung twice"]
    assert jobs.end("successor") == "COMPLETED", jobs.log("successor")
    assert jobs.cluster.job(jobs.ids["successor"])["NodeList"] == "n1"
    blamed = [
        json.loads(file.read_text())["odd"] for file in sorted(run.glob("hangs/*/report.json"))
    ]
    assert [[(odd["node"], odd["phase"]) for odd in report] for report in blamed] == [
        [("n2", "data")]
    ] * 2
    assert (run / "excluded_nodes.txt").read_text().startswith("n2 hung 2 times")
    assert "rank 1 on n2 stands in data of step" in jobs.log("hung twice")
    assert [
        json.loads((run / "restarts.json").read_text())[key] for key in ("job", "restarts")
    ] == [jobs.ids["successor"], 0]
    assert jobs.records("hung twice")[-1]["step"] == 12


# what must be among the parts of a run's time
PARTS = {
    "signal": {QUEUE, START_UP},
    "preemption": {QUEUE, START_UP},
    "requeue": {QUEUE, START_UP},
    "killed rank": {QUEUE, LOST},
    "hung twice": {QUEUE, HANG},
}


@pytest.mark.parametrize("way", PARTS)
def test_every_second_of_a_run_is_accounted_for(jobs: Jobs, way: str):
    """By the clock of Slurm, which counts whole seconds, from the submission to the end."""
    job = "successor" if way == "hung twice" and "successor" in jobs.ids else way
    assert jobs.end(job) == "COMPLETED"
    ended = datetime.fromisoformat(jobs.cluster.job(jobs.ids[job])["EndTime"]).timestamp()
    before, after = jobs.submitted[way]
    shortest_s, longest_s = ended - after, ended + 1 - before
    times = ledger(jobs.run(way))
    parts = times.parts()
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(times.seconds, rel=0.01)
    # the last rank marks its end about a second before Slurm does
    assert 0.99 * shortest_s - 2 <= times.seconds <= 1.01 * longest_s
    assert PARTS[way] <= parts.keys()
    if way == "killed rank":  # a slow step, at most what lies between two saves and the kill
        assert STEP_S / 2 < parts[LOST] < longest_s / 2
    if way in ("signal", "preemption"):
        assert parts.get(LOST, 0.0) < 1.0, "who is warned loses nothing"


def test_predictions_are_an_array_over_files(jobs: Jobs):
    for name in ("a", "b", "c"):
        (jobs.folder / f"{name}.jsonl").write_text(json.dumps({"prompt": f"def {name}("}) + "\n")
    (jobs.folder / "bad.jsonl").write_text("no JSON\n")
    files = [jobs.folder / f"{name}.jsonl" for name in ("a", "bad", "b", "c")]
    out = jobs.folder / "texts"
    small = ["--oversubscribe", "--mem=100", f"--output={jobs.folder}/predict-%a.log"]
    array = jobs.cluster.sbatch(
        "--array=1-2",
        *small,
        "slurm/predict.sbatch",
        jobs.run("whole"),
        out,
        *files,
        "--",
        "generation.max_new_tokens=3",
        cwd=ROOT,
    )
    for task, state in ((1, "COMPLETED"), (2, "FAILED")):
        said = jobs.folder / f"predict-{task}.log"
        assert jobs.cluster.wait(f"{array}_{task}") == state, said.read_text()
    assert "bad.jsonl: exit code 2; going on with the next one" in said.read_text()
    assert sorted(path.name for path in out.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert isinstance(json.loads((out / "b.jsonl").read_text())["prediction"], str)
    twice = jobs.cluster.sbatch(
        *small, "slurm/predict.sbatch", jobs.run("whole"), out, files[0], files[0], cwd=ROOT
    )
    assert jobs.cluster.wait(twice) == "FAILED"


def curve_of(folder: Path) -> dict[int, float]:
    """Return step -> loss as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return {event.step: event.value for event in board.Scalars("1 loss/train")}


def test_all_ended(jobs: Jobs):
    assert {way: jobs.end(way) in ENDED for way in jobs.ids} == dict.fromkeys(jobs.ids, True)
    wait_for(lambda: jobs.cluster.run("squeue", "-h").strip() == "")
