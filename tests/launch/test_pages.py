"""The pages about a real run that was killed and went on, in a real browser."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
import yaml

from tests.helpers.browser import show
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values

pytestmark = pytest.mark.slow


def words_of(document: str) -> str:
    """Return what a person reads on a page."""
    text = re.sub(r"<(style|head).*?</\1>|<[^>]+>", " ", document, flags=re.DOTALL)
    return " ".join(unescape(text).split())


def test_a_report_and_a_diff_of_real_runs(corpus: Path, tmp_path: Path):
    config = tmp_path / "config.yaml"
    train = {"steps": 6, "global_batch": 8, "micro_batch": 2}
    validation = {"shards": str(corpus / "shards" / "validation"), "every_steps": 3}
    values = run_values(corpus, tmp_path, "run", train=train, data={"validation": validation})
    config.write_text(yaml.safe_dump(values))
    hfscale("pretrain", config, "--procs", 1)
    run = tmp_path / "run"
    hfscale("pretrain", run, "train.steps=12", "--procs", 2)
    hfscale("pretrain", config, "run.name=other", "optim.lr=0.02", "--procs", 1)
    hfscale("export", run, tmp_path / "exported")

    page, picture = tmp_path / "run.html", tmp_path / "run.png"
    hfscale("report", run, page)
    document = show(page.as_uri(), home=tmp_path / "home", picture=picture)
    words = words_of(document)
    for expected in (
        "pretrain: clm, gpt2, 43,904 parameters",
        "expected end done",
        "in 2 attempts: goodput",
        "validation_loss",
        "tokens a second",
        "text " + str(corpus / "shards" / "train"),
        str(tmp_path / "exported"),
        "step-00000012",
        f"hfscale pretrain {run}/config.yaml run.name=run-again --procs 2",
    ):
        assert expected in words, expected
    assert document.count("stroke-dasharray") >= 3, "the restart, a dotted line in each panel"
    assert picture.stat().st_size > 50_000

    both = tmp_path / "both.html"
    hfscale("diff", run, tmp_path / "other", both)
    words = words_of(show(both.as_uri(), home=tmp_path / "home"))
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert "optim.lr 0.01 0.02" in words and "train.steps 12 6" in words
    assert "At step 1 they first differ, in lr." in words
    assert "From step 2 on the losses part: " in words and first["step"] == 1
