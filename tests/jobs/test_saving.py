"""What a whole run saves, keeps and says: the best validation, a disk that gives up, and
checkpoints that somebody meddled with.
"""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.checkpoint import layout, manifest
from hfscale.errors import CheckpointError, UserError
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow


def test_the_best_validation_is_saved_at_once_and_kept_also_by_a_resume(
    corpus: Path, tmp_path: Path
) -> None:
    values = run_values(
        corpus,
        tmp_path,
        "run",
        checkpoint={"keep_last": 1, "keep_best": {}, "every_minutes": None},
        data={
            "validation": {
                "shards": str(corpus / "shards" / "validation"),
                "every_steps": 1,
                "rows": 16,
            }
        },
        optim={"lr": 3.0},
        train={"steps": 4},
        schedule={"name": "constant", "warmup_steps": 0},
    )
    records = run_ranks(train, 2, values)[0]
    records += run_ranks(train, 2, {**values, "train": {**values["train"], "steps": 6}})[0]
    losses = {record["step"]: record["validation_loss"] for record in records}
    best = min(losses, key=lambda step: losses[step])
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and best < 4, "at this rate it gets worse"
    assert [layout.step_of(path) for path in layout.committed(tmp_path / "run/checkpoints")] == [
        best,
        6,
    ]
    state = layout.newest_state(tmp_path / "run")
    assert state is not None and state.best is not None
    assert state.best.as_dict() == {
        "metric": "validation_loss",
        "step": best,
        "value": losses[best],
        "stale": 6 - best,
    }
    assert state.metrics["validation_loss"] == losses[6]


def on_a_full_disk(values: dict[str, Any]) -> str:
    """Run with room for small files only; tell what was said."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        train(values)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return ""


def test_a_writer_that_fails_ends_the_run_at_the_next_step(corpus: Path, tmp_path: Path) -> None:
    values = run_values(
        corpus,
        tmp_path,
        "run",
        train={"steps": 400},
        checkpoint={"every_steps": 3, "every_minutes": None},
    )
    unable = "a checkpoint could not be written"
    said = run_ranks(on_a_full_disk, 2, values)
    assert all(unable in message for message in said)
    assert (tmp_path / "run/metrics.jsonl").read_text() == "", "the trial found it before step 1"

    run_ranks(train, 2, {**values, "train": {**values["train"], "steps": 1}})
    said = run_ranks(on_a_full_disk, 2, values)
    assert all(unable in message and "run the same command again" in message for message in said)
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert 3 <= steps[-1] < 60, "soon after the save of step 3"
    assert [path.name for path in layout.committed(tmp_path / "run/checkpoints")] == [
        "step-00000001"
    ]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saved steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    values = run_values(
        corpus, folder, "run", checkpoint={"every_steps": 2, "keep_last": 3, "every_minutes": None}
    )
    run_ranks(train, 1, values)
    (folder / "run/config.yaml").write_text(yaml.safe_dump(values))
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_edited_and_half_copied_checkpoints_and_a_stray_latest(run: Path) -> None:
    """Each says what it found, what it did, and the run goes on from the newest good one."""
    checkpoints = run / "checkpoints"
    (checkpoints / "latest").write_text("step-99999999")
    # half a copy
    shutil.copytree(
        checkpoints / "step-00000006",
        checkpoints / "step-00000009",
        ignore=shutil.ignore_patterns("engine"),
    )
    (checkpoints / "step-00000006/state.json").write_text(
        (checkpoints / "step-00000006/state.json").read_text().replace("1", "2")
    )
    text = hfscale("pretrain", run, "train.steps=8", "--procs", 1).stderr
    assert (
        "step-00000009 is damaged and not loaded" in text
        and "step-00000006 is damaged and not loaded: state.json" in text
    )
    assert str(checkpoints / "rejected/step-00000006") in text and "resumed at step 4 of 8" in text
    assert sorted(path.name for path in (checkpoints / "rejected").iterdir()) == [
        "step-00000006",
        "step-00000009",
    ]


def newer(run: Path) -> str:
    path = run / "checkpoints/step-00000006/manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    body["version"] = manifest.VERSION + 1
    path.write_text(json.dumps({**body, "sha256": manifest._digest(body)}))
    return r"a newer version of hfscale wrote this checkpoint"


def other_model(run: Path) -> str:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["config"]["n_layer"] = (
        3  # in the run's own file, where no comparison of configs can see it
    )
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return "the checkpoint is one of another model: 12 tensors differ"


def other_data(run: Path) -> str:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["sources"][0]["shards"] = config["data"]["sources"][0]["shards"].replace(
        "/train", "/validation"
    )
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return "source text of the checkpoint has other data"


def refusal(run: str) -> str:
    from hfscale.config.load import load_config

    values = load_config(Path(run) / "config.yaml").config.model_dump(mode="json", by_alias=True)
    try:
        train(
            {
                **values,
                "run": {**values["run"], "root": str(Path(run).parent)},
                "train": {**values["train"], "steps": 8},
            }
        )
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("meddle", [newer, other_model, other_data])
def test_what_a_checkpoint_does_not_fit_is_refused_and_the_checkpoint_stays(
    run: Path, meddle: Any
) -> None:
    expected = meddle(run)
    [said] = run_ranks(refusal, 1, str(run))
    assert expected in said and "remedy:" in said, said
    assert [layout.step_of(path) for path in layout.committed(run / "checkpoints")] == [2, 4, 6]
