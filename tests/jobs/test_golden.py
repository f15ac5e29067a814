"""Files of released versions (``tests/golden``) are read, and their runs go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.checkpoint import layout
from hfscale.checkpoint.state import VERSION, read_state
from hfscale.errors import CheckpointError
from hfscale.monitor.fence import attempts
from hfscale.reports.report import report
from launch import run_dir
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
AFTER = {5: (15334699212222208444, 5.427568), 6: (6612970457653741696, 5.378650)}  # 0.1 went on so


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The files of version 0.1, where they can be written to."""
    home = shutil.copytree(GOLDEN / "0.1", tmp_path / "old")
    for name in ("config.yaml", "environment.json"):
        text = (home / "run" / name).read_text()
        (home / "run" / name).write_text(text.replace("@HERE@", str(home)))
    return home


def test_a_run_of_0_1_goes_on_as_it_would_have_then(old: Path) -> None:
    run = old / "run"
    values: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    values["train"]["steps"] = 6
    records = run_ranks(train, 2, values)[0]
    assert {record["step"]: record["batch_digest"] for record in records} == {
        step: digest for step, (digest, _) in AFTER.items()
    }
    losses = [record["loss"] for record in records]
    assert losses == pytest.approx([loss for _, loss in AFTER.values()], rel=1e-3)
    before, after = (
        json.loads((run / f"checkpoints/step-0000000{step}" / layout.STATE).read_text())
        for step in (4, 6)
    )
    assert after.keys() == before.keys() | {"version", "health", "optimizer"}
    assert not layout.state_of(run / "checkpoints/step-00000006").model_extra, "each key has a name"


def test_attempts_of_0_1_have_ends(old: Path) -> None:
    first, second = attempts(old / "run")
    end = first.ending()
    assert end is not None and end.code == 0
    assert second.ending() is None
    run_dir.take(old / "run", launcher="local")
    end = second.ending()
    assert end is not None and (end.code, end.closed_by) == (None, 3)
    assert end.doing == "save of step 4"


def test_the_page_of_a_run_of_0_1(old: Path) -> None:
    html = report(old / "run")
    assert "pretrain: clm" in html and "validation_loss" in html
    assert "nothing here says when this run began" in html, "it kept no times"


def test_what_checkpoints_of_0_1_say(old: Path) -> None:
    state = layout.newest_state(old / "run")
    assert state is not None and state.best is not None
    assert (state.version, state.step, state.tokens_seen, state.best.step) == (1, 4, 1024, 4)
    assert state.position.consumed_rows == 32
    adapters = read_state(old / "adapters-state.json").adapters
    assert adapters is not None and adapters.match.rows == (27, 27)
    assert adapters.folder == "@HERE@/encoder"


def test_states_of_later_versions(old: Path) -> None:
    """A new key is carried along; a new version is refused by its number, whatever else it says."""
    file = old / "run/checkpoints/step-00000004" / layout.STATE
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"of_later": 1}))
    assert json.loads(read_state(file).to_json()) == {"version": VERSION, **said, "of_later": 1}
    file.write_text(json.dumps(said | {"version": VERSION + 1, "step": "4 of 9"}))
    with pytest.raises(CheckpointError, match="later version of hfscale") as refused:
        read_state(file)
    assert f"version {VERSION + 1}" in str(refused.value)
