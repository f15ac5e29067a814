"""The numbers that follow from a config, with data of every kind: what cannot be known is said, not
guessed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hfscale.reports.show import show_config
from hfscale.shards.manifest import Manifest
from hfscale.shards.raw import index_tars
from tests.helpers.corpus import run_values
from tests.shards.test_verify import write_tar


@pytest.mark.parametrize(
    ("kinds", "train", "facts"),
    [
        (
            ["tokens"],
            {},
            ["tokens a step  512", "steps          6", "tokens         3,072", r"of {rows:,} rows"],
        ),
        (["tokens"], {"steps": None, "epochs": 2}, ["epochs         2 of {rows:,} rows"]),
        (
            ["text"],
            {},
            [
                "steps          6",
                "epochs         not known before raw text is tokenized: 3 samples",
            ],
        ),
        (
            ["text", "tokens"],
            {},
            [
                "tokens         3,072",
                "epochs         not known before raw text is tokenized: 3 samples",
            ],
        ),
        (
            ["text"],
            {"steps": None, "epochs": 2},
            ["steps          not known before raw text is tokenized: 3 samples"],
        ),
        (
            ["nothing"],
            {"steps": None, "epochs": 2},
            ["steps          not known before there are shards at "],
        ),
    ],
)
def test_what_follows_from_a_config(
    corpus: Path, tmp_path: Path, kinds: list[str], train: dict[str, int], facts: list[str]
) -> None:
    tar = write_tar(tmp_path / "raw" / "a.tar", {f"{k}.txt": b"a text" for k in range(3)})
    index_tars([tar], folder=tar.parent, field=None, threads=1)
    places = {
        "tokens": corpus / "shards" / "train",
        "text": tar.parent,
        "nothing": tmp_path / "nothing",
    }
    data = {"sources": [{"name": kind, "shards": str(places[kind])} for kind in kinds]}
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(run_values(corpus, tmp_path, "run", data=data, train=train))
    )
    said = [line.strip() for line in show_config(tmp_path / "run.yaml").splitlines()]
    shown = "\n".join(said[said.index("") :])
    rows = sum((shard.tokens - 1) // 32 for shard in Manifest.load(places["tokens"]).shards)
    for fact in facts:
        assert fact.format(rows=rows) in shown, shown
