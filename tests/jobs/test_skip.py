"""``data.on_error: skip`` in real runs: damaged rows train nothing, are counted alike on any number
of ranks, and stop all at once.
"""

from __future__ import annotations

import json
import shutil
from math import isfinite
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.errors import DataError
from hfscale.reports.batch import rebuild
from tests.helpers.corpus import LLAMA, run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow

EXACT = ("step", "batch_digest", "tokens_seen", "skipped_rows")


@pytest.fixture(scope="module")
def damaged(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with one of its shards missing."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(corpus, folder, dirs_exist_ok=True)
    sorted((folder / "shards" / "train").glob("*.tar"))[1].unlink()
    return folder


def skip(
    corpus: Path, root: Path, name: str, *, max_skipped: float, **sections: dict[str, Any]
) -> dict[str, Any]:
    # and a model without dropout: equal losses however the run is cut
    constant = {
        "name": "constant",
        "warmup_steps": 0,
    }
    return run_values(
        corpus,
        root,
        name,
        model=LLAMA,
        schedule=constant,
        data={"on_error": "skip", "max_skipped": max_skipped},
        **sections,
    )


def stopped_at(values: dict[str, Any]) -> str:
    """Return what stopped a run, on each rank; for ``run_ranks``."""
    try:
        train(values)
    except DataError as error:
        return str(error)
    return "done"


def test_ranks_count_alike_and_a_resume_counts_on(damaged: Path, tmp_path: Path) -> None:
    saving = {"every_steps": 3, "every_minutes": None}
    [alone] = run_ranks(train, 1, skip(damaged, tmp_path, "one", max_skipped=0.9))
    first, _ = run_ranks(
        train,
        2,
        skip(damaged, tmp_path, "two", max_skipped=0.9, checkpoint=saving, train={"steps": 3}),
    )
    second, _ = run_ranks(
        train, 2, skip(damaged, tmp_path, "two", max_skipped=0.9, checkpoint=saving)
    )
    assert [record["step"] for record in second] == [4, 5, 6]
    for record, other in zip(alone, first + second, strict=True):
        assert {key: record.get(key) for key in EXACT} == {key: other.get(key) for key in EXACT}
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-4) and isfinite(record["loss"])
    assert 0 < alone[-1]["skipped_rows"] < 6 * 16
    logged = [
        json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    ]
    assert logged[-1]["skipped_rows"] == alone[-1]["skipped_rows"]


def test_a_step_with_skipped_rows_is_rebuilt(damaged: Path, tmp_path: Path) -> None:
    values = skip(damaged, tmp_path, "run", max_skipped=0.9)
    [records] = run_ranks(train, 1, values)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(RunConfig.model_validate(values)))
    steps = [rebuild(tmp_path / "run", step=step) for step in range(1, 7)]
    assert [step.digest for step in steps] == [record["batch_digest"] for record in records]
    assert (
        sum(row.member == "damaged" for step in steps for row in step.rows)
        == records[-1]["skipped_rows"]
    )


def test_a_step_without_a_valid_row_has_no_loss(damaged: Path, tmp_path: Path) -> None:
    for side in ("train", "validation"):
        for tar in (damaged / "shards" / side).glob("*.tar"):
            (tmp_path / side).mkdir(exist_ok=True)
            for name in (tar.with_suffix(".idx").name, "manifest.json"):
                shutil.copy(tar.parent / name, tmp_path / side)
    values = skip(
        damaged,
        tmp_path,
        "empty",
        max_skipped=1.0,
        train={"steps": 2},
        optim={"lr": 1e-2, "weight_decay": 0.0},
    )
    values["data"] = {
        "seq_len": 32,
        "sources": [{"shards": str(tmp_path / "train")}],
        "on_error": "skip",
        "max_skipped": 1.0,
        "validation": {"shards": str(tmp_path / "validation"), "every_steps": 2, "rows": 8},
    }
    run_ranks(train, 2, values)
    records = [
        json.loads(line) for line in (tmp_path / "empty" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [
        (record["loss"], record["grad_norm"], record["skipped_rows"]) for record in records
    ] == [(None, 0.0, 16), (None, 0.0, 32)]
    assert records[-1]["validation_loss"] is records[-1]["validation_perplexity"] is None


def test_more_damage_than_allowed_stops_every_rank_at_the_same_step(
    damaged: Path, tmp_path: Path
) -> None:
    values = skip(damaged, tmp_path, "over", max_skipped=0.0001)
    first, second = run_ranks(stopped_at, 2, values)
    assert first == second
    assert (
        "more data is damaged than data.max_skipped allows" in first and "rows skipped of" in first
    )
