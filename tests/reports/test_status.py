"""Where a run is, from its files."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.monitor.fence import take
from hfscale.monitor.incidents import LOSS, Incident
from hfscale.monitor.lines import Lines
from hfscale.reports.status import describe, last_record, progress, slowest_rank, steps_left
from hfscale.run_files import INCIDENTS
from tests.helpers.cli import ROOT, hfscale, listen_to_ctrl_c

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


def words(*arguments: Any, **named: Any) -> dict[str, str]:
    """Return what ``describe`` says, by its names."""
    return {line.name: line.words for line in describe(*arguments, **named)}


def test_the_last_incident(tmp_path: Path):
    settings = config(tmp_path, steps=100)
    settings.run_dir.mkdir(parents=True)
    lines = Lines(settings.run_dir / INCIDENTS, fence=None)
    for step in (7, 19):
        told = Incident(step=step, kind=LOSS, decision="rewind", text="", time=1000.0 + step)
        lines.append(told.model_dump(mode="json"))
    lines.close()
    [line] = [line for line in describe(settings, now=1079.0) if line.name == "last incident"]
    assert line.words.startswith("loss_spike in step 19: rewind, 0:01:00 ago; 2 in all")
    assert line.value == {
        "step": 19,
        "kind": LOSS,
        "decision": "rewind",
        "age_s": 60.0,
        "count": 2,
    }


def test_a_run_that_has_not_begun(tmp_path: Path):
    lines = words(config(tmp_path, steps=100))
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
    lines = words(config(tmp_path, steps=100))
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
    assert words(config(tmp_path, steps=100))["expected end"] != "done"
    attempt.end(0)
    assert words(config(tmp_path, steps=100))["expected end"] == "done"


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
    lines = words(config(tmp_path, steps=100), now=1_000_010.0)
    assert lines["step"] == "25 (25.0%), logged 0:00:10 ago"
    assert lines["speed"] == "1,000 tokens/s, 2 s a step, 25% of it waiting for data"
    assert lines["expected end"].endswith("(0:02:30 of training left)")
    still = words(config(tmp_path, steps=100), now=1_000_010.0, running=False)
    assert still["expected end"] == "not while it does not run (0:02:30 of training left)"
    assert lines["last checkpoint"] == "step 20, 0:01:50 ago"
    assert lines["attempts"] == "2"


def test_the_expected_end_has_a_spread_where_steps_differ(tmp_path: Path):
    run = tmp_path / "r"
    run.mkdir()
    steps = [{**RECORD, "step": step, "step_s": 1.0 + step / 10} for step in range(1, 21)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in steps))
    [end] = [
        line
        for line in describe(config(tmp_path, steps=120), now=0.0)
        if line.name == "expected end"
    ]
    # the median of 1.1, 1.2 ... 3.0 s, the third from below and the third from above
    assert end.value == {
        "done": False,
        "left_s": pytest.approx(205.0),
        "left_s_between": pytest.approx([130.0, 280.0]),
        "at": pytest.approx(205.0),
    }
    assert end.words.endswith(
        "(0:03:25 of training left, between 1970-01-01 00:02 and 1970-01-01 00:04)"
    )


def test_a_damaged_line_of_a_side_file_costs_one_line(tmp_path: Path):
    run = tmp_path / "r"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    take(run, launcher="local")
    for name in ("goodput.jsonl", "incidents.jsonl"):
        (run / name).write_text('{"step": "many"}\n')
    lines = words(config(tmp_path, steps=100))
    assert lines["loss"] == "3.5000"
    assert lines["goodput"].startswith("not known: a record of the run is damaged")
    assert lines["last incident"].startswith("not known: a record of the run is damaged")


def test_the_rank_that_needs_most_time(tmp_path: Path):
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    for rank, own_s in enumerate((10.0, 10.0, 15.0)):
        (folder / f"rank-{rank}").write_text(f"90 25 collective {own_s} 7 n{rank}\n")
    slowest = slowest_rank(tmp_path)
    assert slowest is not None
    assert slowest.words == (
        "rank 2 on n2: 50% more time in data and forward than the others; "
        "now in collective of step 25"
    )
    for rank in (1, 2):
        (folder / f"rank-{rank}").unlink()
    assert slowest_rank(tmp_path) is None, "one rank has nobody to be slower than"


def test_status_is_shown_anew_until_ctrl_c_and_is_json_for_scripts(tmp_path: Path):
    run = tmp_path / "r"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config(tmp_path, steps=100)))
    (run / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    command = [sys.executable, "-m", "launch.cli", "status", str(run)]
    ours, theirs = pty.openpty()
    watching = subprocess.Popen(
        [*command, "--watch"],
        cwd=ROOT,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=listen_to_ctrl_c,
    )
    screen = b""
    while screen.count(b"\x1b[H") < 2 or not screen.endswith(b"\x1b[J\r\n"):
        assert watching.poll() is None
        screen += os.read(ours, 65536)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(60) == 0
    assert screen.count(b"25 (25.0%)") == 2
    for end in (ours, theirs):
        os.close(end)
    done = hfscale("status", str(run), "--json")
    assert json.loads(done.stdout)["step"]["step"] == 25


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
