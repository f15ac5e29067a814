"""A planted document is named first by ``hfscale incident``, with its text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.errors import DataError
from hfscale.monitor.incidents import GRADIENT, Incident
from hfscale.monitor.lines import Lines
from hfscale.reports.incident import listed, pick, rerun
from hfscale.run_files import INCIDENTS
from hfscale.tokenizer import end_of_document_id, load_tokenizer
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values
from tests.helpers.poison import plant
from tests.helpers.pretraining import pretraining
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

STEP, BATCH, PLANTED = 5, 16, 4 * 16 + 11
ENDS = 8  # the token of that row that ends a document


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, in whose fifth a document of one token began in the middle of a row."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(corpus / "shards", root / "shards")
    data = {"sources": [{"shards": str(root / "shards" / "train")}], "verify": False}
    values = run_values(corpus, root, "run", data=data, checkpoint={"every_steps": 2})
    config = RunConfig.model_validate(values)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    [of_self] = tokenizer.encode(" self")
    ordinary = tokenizer.encode("import os")[: ENDS - 1]
    ordinary += ordinary[-1:] * (ENDS - 1 - len(ordinary))
    plant(config, PLANTED, [*ordinary, end_of_document_id(tokenizer), *[of_self] * (32 - ENDS)])
    run_ranks(train, 2, values)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    lines = Lines(config.run_dir / INCIDENTS, fence=None)
    rows = (STEP - 1) * BATCH, STEP * BATCH
    told = Incident(step=STEP, kind=GRADIENT, decision="warn", text="grad_norm 9", rows=rows)
    lines.append(told.stamped(1).model_dump(mode="json"))
    lines.close()
    return config.run_dir


def test_the_planted_document_is_named_first(run: Path) -> None:
    incident = pick(run, 1)
    again = rerun(run, step=incident.step, rows_of=incident.rows)
    worst = again.by_gradient()[0]
    assert (again.checkpoint, again.rows) == ("step-00000004", BATCH)
    assert worst.part.position == PLANTED
    assert worst.part.text.startswith(" self self self")
    # parts of a sum: without the worst, what is left is less, and the norms obey the triangle
    assert worst.rest < again.grad_norm <= worst.rest + worst.grad_norm


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bert", "contrastive", "contrastive_mlm"])
def test_parts_of_rows_add_up_to_the_gradient_that_the_step_had(
    corpus: Path, tmp_path: Path, kind: str
) -> None:
    steps = {"steps": 3, "global_batch": BATCH, "micro_batch": BATCH}
    values = pretraining(corpus, tmp_path, "run", kind, train=steps, checkpoint={"every_steps": 2})
    [records] = run_ranks(train, 1, values)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(RunConfig.model_validate(values)))
    again = rerun(tmp_path / "run", step=3, rows_of=(2 * BATCH, 3 * BATCH))
    assert again.grad_norm == pytest.approx(records[2]["grad_norm"], rel=1e-4)
    worst = again.by_gradient()[0]
    assert worst.rest <= again.grad_norm + worst.grad_norm and worst.part.text


def test_one_that_is_not_there(run: Path) -> None:
    assert len(listed(run)) == 1 and "grad_norm 9" in listed(run)[0]
    with pytest.raises(DataError, match="no incident of that number"):
        pick(run, 2)


@pytest.mark.slow
def test_the_command(run: Path) -> None:
    assert "step        5  warn    grad_norm 9" in hfscale("incident", run).stdout
    said = hfscale("incident", run, "1").stdout
    assert f"row {PLANTED}  " in said.split("  1. ")[1].split("  2. ")[0]
