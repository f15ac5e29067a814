"""A fine-tuning is a Slurm job like any other, and its checkpoints are evaluated by an array."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import yaml

from tests.helpers.cli import ROOT
from tests.helpers.labelled import make_encoder, reviews, task_values, write_jsonl
from tests.helpers.slurm import Cluster

pytestmark = pytest.mark.slow


def test_a_fine_tuning_and_its_evaluation(cluster: Cluster, tmp_path: Path) -> None:
    make_encoder(tmp_path / "encoder")
    write_jsonl(tmp_path / "reviews.jsonl", reviews(200))
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            task_values(
                tmp_path, "run", checkpoint={"every_steps": 3}, cluster={"allow_local_disk": True}
            )
        )
    )
    log = tmp_path / "log"
    small = ["--oversubscribe", "--mem=100", f"--output={log}-%j"]
    job = cluster.sbatch(
        "--hold", "--nodes=2", "--ntasks-per-node=1", *small, "slurm/train.sbatch", config, cwd=ROOT
    )
    # somebody has the port where its ranks would meet
    with socket.create_server(("", 10_000 + int(job) % 20_000)):
        cluster.run("scontrol", "release", job)
        ended = cluster.wait(job)
    assert ended == "COMPLETED", "".join(file.read_text() for file in tmp_path.glob("log-*"))
    run = tmp_path / "runs" / "run"
    assert (
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["validation_accuracy"] >= 0
    )
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-00000003", "step-00000006"]
    array = cluster.sbatch(
        "--array=0-1",
        *small,
        "slurm/evaluate.sbatch",
        *checkpoints,
        "--",
        "predict.split=validation",
        cwd=ROOT,
    )
    for task in (0, 1):
        assert cluster.wait(f"{array}_{task}") == "COMPLETED", "".join(
            file.read_text() for file in tmp_path.glob("log-*")
        )
    assert len([*(run / "evaluations").glob("*/step-*/scores.json")]) == 2
