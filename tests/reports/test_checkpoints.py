"""The list of checkpoints and why each is kept, what verification finds, and what --pin and --prune
do.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hfscale.checkpoint.manifest import write_file, write_manifest
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values


@pytest.fixture
def run(tmp_path: Path) -> Path:
    values = run_values(
        tmp_path,
        tmp_path,
        "run",
        checkpoint={"keep_last": 1, "keep_every_steps": 10},
        data={"validation": {"shards": str(tmp_path)}},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def save(run: Path, step: int, best: int | None = None) -> Path:
    folder = run / f"checkpoints/step-{step:08}"
    state = {
        "step": step,
        "tokens_seen": step * 1000,
        "zero_stage": 1,
        "precision": "fp32",
        "world_size": 2,
    }
    state["best"] = best and {"metric": "validation_loss", "step": best, "value": 2.5}
    entries = [
        write_file(folder, "state.json", [json.dumps(state).encode()]),
        write_file(folder, "engine/rank-00000.safetensors", [bytes(100)]),
    ]
    write_manifest(folder, entries, step=step)
    return folder


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def test_list_and_verify(run: Path):
    save(run, 1)
    damaged = save(run, 2, best=1)
    lines = hfscale("checkpoints", run).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["step-00000001", "step-00000002"]
    assert "2,000 tokens" in lines[1] and "(0 min ago)" in lines[1] and lines[1].endswith("[last]")
    assert lines[0].endswith("[best validation_loss 2.5]")
    assert hfscale("checkpoints", run, "--verify").stdout.count(" ok") == 2

    (damaged / "engine/rank-00000.safetensors").write_bytes(bytes(99) + b"1")
    done = hfscale("checkpoints", run, "--verify", check=False)
    assert done.returncode == 1
    assert "step-00000001" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[0].endswith("ok")
    assert done.stdout.splitlines()[1].endswith("damaged")
    assert "engine/rank-00000.safetensors" in done.stdout.splitlines()[2]


def test_pin_and_prune_and_the_newest_good_one_stays(run: Path):
    for step in (5, 10, 11, 12, 13):
        save(run, step)
    (save(run, 14) / "state.json").write_text("{")
    text = hfscale("checkpoints", run, "--pin", 5, "--pin", 11, "--unpin", 5).stdout
    assert (
        "step-00000005" in text
        and "[nothing keeps it: goes at the next pruning]" in text.splitlines()[0]
    )
    assert [line.partition("[")[2] for line in text.splitlines()[1:3]] == ["permanent]", "pinned]"]
    assert "removed step-00000005, step-00000012; " in hfscale("checkpoints", run, "--prune").stdout
    assert steps(run) == [10, 11, 13, 14], "14 is the last, but damaged: 13 is the newest good one"
    refused = hfscale("checkpoints", run, "--pin", 12, check=False)
    assert (
        refused.returncode == 2
        and "no checkpoint of this step" in refused.stderr
        and "10, 11, 13, 14" in refused.stderr
    )


def test_a_run_without_checkpoints_rejected_ones_and_no_run(run: Path):
    (run / "checkpoints/rejected/step-00000003").mkdir(parents=True)
    text = hfscale("checkpoints", run).stdout
    assert "no checkpoints" in text
    assert "rejected/step-00000003" in text
    assert "removed nothing" in hfscale("checkpoints", run, "--prune").stdout
    refused = hfscale("checkpoints", run / "checkpoints", check=False)
    assert refused.returncode == 2 and "directory" in refused.stderr
