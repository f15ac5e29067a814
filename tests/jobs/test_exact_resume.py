"""Train 6 = train 3 + resume 3, bit for bit, through the command line in processes of their own;
and after any stop at all.

Each run accumulates two micro-batches on each of two ranks, has dropout 0.1, ends its warmup after
step 4 and its epoch before step 6.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.shards.manifest import Manifest
from tests.helpers.cli import ROOT, hfscale
from tests.helpers.corpus import run_values

pytestmark = pytest.mark.slow
EXACT = ("loss", "lr", "grad_norm", "batch_digest", "tokens_seen")


def write_config(corpus: Path, folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    """Return the path of a config whose epoch is a little over four steps."""
    shards = corpus / "shards" / "validation"
    rows = sum((shard.tokens - 1) // 32 for shard in Manifest.load(shards).shards)
    micro_batch = rows // 4 // 4
    values = run_values(
        corpus,
        folder / "runs",
        name,
        **{
            "data": {"sources": [{"shards": str(shards)}]},
            "schedule": {"name": "cosine", "warmup_steps": 4},
            "train": {"steps": 6, "global_batch": 4 * micro_batch, "micro_batch": micro_batch},
            **sections,
        },
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def records(run: Path, attempt: int) -> dict[int, dict[str, Any]]:
    """Return the exact figures of each step that ``attempt`` logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {key: line[key] for key in EXACT}
        for line in lines
        if line["attempt"] == attempt
    }


def digests(checkpoint: Path) -> dict[str, str]:
    """Return file -> SHA-256 of every rank's weights and moments."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {
        entry["path"]: entry["sha256"] for entry in files if entry["path"].startswith("engine/")
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_six_steps_are_three_and_three(
    corpus: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    config = write_config(
        corpus,
        tmp_path,
        "run",
        engine={"zero_stage": stage, "precision": precision},
        checkpoint={"every_steps": 3, "keep_every_steps": 3, "every_minutes": None},
    )
    run, aside = tmp_path / "runs" / "run", tmp_path / "aside"
    hfscale("pretrain", config, "--procs", 2)
    shutil.move(run / "checkpoints" / "step-00000006", aside)  # as if killed after step 3 was saved
    hfscale("pretrain", config, "--procs", 2)

    first, second = records(run, 1), records(run, 2)
    assert sorted(second) == [4, 5, 6]
    assert {step: first[step] for step in second} == second
    assert digests(aside) == digests(run / "checkpoints" / "step-00000006")
    assert len(digests(aside)) == 2, "one file a rank"
    state = json.loads((aside / "state.json").read_text())
    assert state["stream"]["consumed_rows"] > state["stream"]["epoch_rows"], (
        "the epoch did not end within the run"
    )


def test_any_stop_is_resumed_exactly_and_again(corpus: Path, tmp_path: Path) -> None:
    sections = {
        "train": {"steps": 120, "global_batch": 16, "micro_batch": 4},
        "checkpoint": {"every_minutes": None, "async": True},
    }
    hfscale("pretrain", write_config(corpus, tmp_path, "whole", **sections), "--procs", 2)
    stopped = write_config(corpus, tmp_path, "stopped", **sections)
    run = tmp_path / "runs" / "stopped"
    for attempt, how in ((1, signal.SIGTERM), (2, signal.SIGINT)):
        assert stop_after(stopped, run, how, lines=20 * attempt) == 75
        assert records(run, attempt), f"attempt {attempt} made no step"
    hfscale("pretrain", run, "--procs", 2)  # the run directory is enough

    whole = records(tmp_path / "runs" / "whole", 1)
    parts = records(run, 1) | records(run, 2) | records(run, 3)
    assert sum(len(records(run, attempt)) for attempt in (1, 2, 3)) == 120, (
        "a graceful stop repeats no step"
    )
    assert parts == whole
    newest = "checkpoints/step-00000120"
    assert digests(run / newest) == digests(tmp_path / "runs" / "whole" / newest)


def stop_after(config: Path, run: Path, how: signal.Signals, *, lines: int) -> int:
    """Return the exit code of a run that gets a signal once ``metrics.jsonl`` has ``lines``
    lines.
    """
    command = [sys.executable, "-m", "launch.cli", "pretrain", str(config), "--procs", "2"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            process.send_signal(how)
            return process.wait(60)
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"the run ended with {process.wait()} before it had made {lines} steps")
