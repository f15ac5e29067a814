"""Any step of a run is rebuilt from the shards alone, and its digest is the one that the ranks
logged.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.errors import DataError
from hfscale.reports.batch import rebuild
from hfscale.stream.digest import digest_rows
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train


@pytest.fixture(scope="module")
def run(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A run directory and its records; of seven steps, the second, fourth, sixth and last were
    logged.
    """
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


def test_a_record_of_before_is_compared_by_what_it_was_of(
    run: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Metrics without a version are of the inputs alone; the command says so and still proves
    them.
    """
    now = rebuild(run[0], step=2)
    ids = [row.ids for row in now.rows]
    shutil.copytree(run[0], tmp_path / "run")
    lines = [{**record, "batch_digest": digest_rows(np.array(ids)[:, :-1])} for record in run[1]]
    lines = [{k: v for k, v in line.items() if k != "digest_version"} for line in lines]
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(metrics)
    then = rebuild(tmp_path / "run", step=2)
    assert (now.version, then.version) == (2, 1)
    assert now.digest == now.logged == digest_rows(np.array(ids)) != then.digest == then.logged
    said = hfscale("batch", str(tmp_path / "run"), "--step", "2")
    assert said.returncode == 0 and "equals the logged one (version 1" in said.stdout


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
