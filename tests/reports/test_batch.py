"""Any step of a run is rebuilt from the shards alone, and its digest is the one that the ranks logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.errors import DataError
from hfscale.reports.batch import rebuild
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train


@pytest.fixture(scope="module")
def run(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A run directory and its records; of seven steps, the second, fourth, sixth and last were logged."""
    root = tmp_path_factory.mktemp("runs")
    values = run_values(corpus, root, "run", train={"steps": 7}, metrics={"every_steps": 2})
    records = run_ranks(train, 2, values)[0]
    (root / "run" / "config.yaml").write_text(to_yaml(RunConfig.model_validate(values)))
    return root / "run", records


def test_every_step_is_rebuilt(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = run
    logged = {record["step"]: record["batch_digest"] for record in records}
    steps = {step: rebuild(folder, step=step) for step in range(1, 8)}
    assert {step: rebuilt.digest for step, rebuilt in steps.items() if step in logged} == logged
    assert [step for step, rebuilt in steps.items() if rebuilt.logged is not None] == [2, 4, 6, 7]
    positions = [row.position for rebuilt in steps.values() for row in rebuilt.rows]
    assert positions == list(range(7 * 16))


def test_texts_are_those_of_the_corpus(
    run: tuple[Path, list[dict[str, Any]]], corpus: Path
) -> None:
    texts = [file.read_text("utf-8") for file in (corpus / "text").iterdir()]
    rows = rebuild(run[0], step=3).rows
    inside = [
        row for row in rows if row.documents[0] == row.documents[1] and "\ufffd" not in row.text
    ]
    assert len(inside) > 8
    assert [row.text for row in inside if not any(row.text in text for text in texts)] == []


@pytest.mark.slow
def test_the_command_proves_it_or_says_that_it_cannot(
    run: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, _ = run
    assert "equals the logged one" in hfscale("batch", folder, "--step", 4).stdout
    assert "not logged" in hfscale("batch", folder, "--step", 5).stdout
    beyond = hfscale("batch", folder, "--step", 8, check=False)
    assert beyond.returncode == 2 and "its last logged step is 7" in beyond.stderr
    with pytest.raises(DataError, match="count from 1"):
        rebuild(folder, step=0)


def test_another_order_is_noticed(run: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.yaml").write_text(
        (run[0] / "config.yaml").read_text().replace("seed: 3", "seed: 4")
    )
    (copy / "metrics.jsonl").write_text((run[0] / "metrics.jsonl").read_text())
    assert json.loads((copy / "metrics.jsonl").read_text().splitlines()[0])["step"] == 2
    done = hfscale("batch", copy, "--step", 2, check=False)
    assert done.returncode == 1 and "is NOT the logged one" in done.stdout
