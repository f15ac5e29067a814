"""Where a run is, from its files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hfscale.config.schema import RunConfig
from hfscale.monitor.fence import take
from hfscale.reports.status import describe, last_record, progress, steps_left

RECORD = {
    "step": 25,
    "loss": 3.5,
    "tokens_seen": 2500,
    "tokens_per_s": 1000.0,
    "step_s": 2.0,
    "data_wait_s": 0.5,
    "epoch": 0.5,
    "attempt": 2,
}


def config(root: Path, **length: float) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "r", "root": str(root)},
            "tokenizer": {"path": "/t"},
            "data": {"seq_len": 8, "sources": [{"shards": "/s"}]},
            "model": {"architecture": "gpt2"},
            "objective": {"name": "clm"},
            "train": {"global_batch": 4, "micro_batch": 2, **length},
        }
    )


def test_a_run_that_has_not_begun(tmp_path: Path):
    lines = dict(describe(config(tmp_path, steps=100)))
    assert (lines["step"], lines["last checkpoint"], lines["attempts"]) == (
        "none was logged yet",
        "none",
        "0",
    )


def test_how_each_attempt_ended(tmp_path: Path):
    run = tmp_path / "r"
    run.mkdir()
    take(run, launcher="slurm", job="7", nodes="n[1-2]").end(75)
    take(run, launcher="local").end(137)
    take(run, launcher="local")
    take(run, launcher="local")
    lines = dict(describe(config(tmp_path, steps=100)))
    first = lines["attempt 1"]
    assert first.startswith("slurm on n[1-2], job 7 (restart 0), since 20")
    assert first.endswith(": stopped and saved (exit code 75)")
    assert lines["attempt 2"].endswith(": killed by SIGKILL")
    assert "it was killed, or its machine was lost" in lines["attempt 3"]
    assert lines["attempt 4"].endswith("no end yet")
    assert lines["attempts"] == "4", "those that logged no step among them"


def test_a_run_that_patience_ended_is_done(tmp_path: Path):
    run = tmp_path / "r"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    attempt = take(run, launcher="local")
    assert dict(describe(config(tmp_path, steps=100)))["expected end"] != "done"
    attempt.end(0)
    assert dict(describe(config(tmp_path, steps=100)))["expected end"] == "done"


def test_a_run_under_way(tmp_path: Path):
    run = tmp_path / "r"
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    manifest = run / "checkpoints" / "step-00000020" / "manifest.json"
    metrics = run / "metrics.jsonl"
    metrics.write_text(
        json.dumps({**RECORD, "step": 24}) + "\n" + json.dumps(RECORD) + "\n" + '{"step": 26, "lo'
    )
    manifest.touch()
    for file, at in ((metrics, 1_000_000), (manifest, 999_900)):
        os.utime(file, (at, at))
    assert last_record(run) == RECORD, "a torn line is not one"
    lines = dict(describe(config(tmp_path, steps=100), now=1_000_010.0))
    assert lines["step"] == "25 (25.0%), logged 0:00:10 ago"
    assert lines["speed"] == "1,000 tokens/s, 2 s a step, 25% of it waiting for data"
    assert lines["expected end"].endswith("(0:02:30 of training left)")
    still = dict(describe(config(tmp_path, steps=100), now=1_000_010.0, running=False))
    assert still["expected end"] == "not while it does not run (0:02:30 of training left)"
    assert lines["last checkpoint"] == "step 20, 0:01:50 ago"
    assert lines["attempts"] == "2"


def test_progress_is_in_steps_tokens_or_epochs(tmp_path: Path):
    assert progress(config(tmp_path, steps=50), RECORD) == 0.5
    assert progress(config(tmp_path, tokens=10_000), RECORD) == 0.25
    assert progress(config(tmp_path, epochs=2), RECORD) == 0.25
    assert progress(config(tmp_path, steps=25), RECORD) == 1.0


def test_steps_that_are_left_are_of_the_present_batch(tmp_path: Path):
    assert steps_left(config(tmp_path, steps=50), RECORD) == 25
    assert steps_left(config(tmp_path, steps=20), RECORD) == 0
    # 25 steps read 2,500 tokens, more than a batch of 4 rows of 8 tokens each time: the batch was
    # larger
    assert steps_left(config(tmp_path, tokens=10_000), RECORD) == 7500 / 32
    assert steps_left(config(tmp_path, epochs=2), RECORD) == 75
