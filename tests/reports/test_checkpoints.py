"""The list of checkpoints, and what verification finds."""
from __future__ import annotations

import json
from pathlib import Path

from hfscale.checkpoint.manifest import write_file, write_manifest
from tests.helpers.cli import hfscale


def save(run: Path, step: int) -> Path:
    folder = run / f"checkpoints/step-{step:08}"
    state = {"tokens_seen": step * 1000, "zero_stage": 1, "precision": "fp32", "world_size": 2}
    entries = [write_file(folder, "state.json", [json.dumps(state).encode()]),
               write_file(folder, "engine/rank-00000.safetensors", [bytes(100)])]
    write_manifest(folder, entries, step=step)
    return folder


def test_list_and_verify(tmp_path: Path):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    lines = hfscale("checkpoints", tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["step-00000001", "step-00000002"]
    assert "2,000 tokens" in lines[1]
    assert hfscale("checkpoints", tmp_path, "--verify").stdout.count(" ok") == 2

    (damaged / "engine/rank-00000.safetensors").write_bytes(bytes(99) + b"1")
    done = hfscale("checkpoints", tmp_path, "--verify", check=False)
    assert done.returncode == 1
    assert "step-00000001" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[0].endswith("ok")
    assert done.stdout.splitlines()[1].endswith("damaged")
    assert "engine/rank-00000.safetensors" in done.stdout.splitlines()[2]


def test_a_run_without_checkpoints_and_rejected_ones(tmp_path: Path):
    (tmp_path / "checkpoints/rejected/step-00000003").mkdir(parents=True)
    text = hfscale("checkpoints", tmp_path).stdout
    assert "no checkpoints" in text
    assert "rejected/step-00000003" in text
