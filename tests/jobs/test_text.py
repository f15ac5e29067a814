"""Real runs on raw text through the command line: other numbers of ranks, a mixture with token
shards, validation.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import webdataset
import yaml

from hfscale.errors import ConfigError
from hfscale.reports.batch import rebuild
from launch.job import Training
from launch.local import launch
from launch.request import Request
from tests.helpers.cli import hfscale
from tests.helpers.corpus import LLAMA, run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import check_rewind, train


@pytest.fixture(scope="module")
def raw(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tars, written by stock webdataset and indexed by the command, some of them
    Chinese.
    """
    folder = tmp_path_factory.mktemp("raw")
    with webdataset.ShardWriter(str(folder / "raw-%03d.tar"), maxcount=12, verbose=0) as tars:
        for k, file in enumerate(sorted((corpus / "text").iterdir())[:40]):
            tars.write(
                {
                    "__key__": file.stem,
                    "json": {
                        "content": "训练数据，" * 50 if k % 7 == 0 else file.read_text("utf-8")
                    },
                }
            )
    assert (
        "40 samples in 4 tars"
        in hfscale("shards", "index", *folder.glob("*.tar"), "--field", "json.content").stdout
    )
    return folder


def values(
    corpus: Path, raw: Path, root: Path, name: str, **sections: dict[str, Any]
) -> dict[str, Any]:
    sources = [
        {"name": "web", "shards": str(raw), "weight": 0.7},
        {"name": "code", "shards": str(corpus / "shards" / "train"), "weight": 0.3},
    ]
    data = {
        "seq_len": 32,
        "block": 32,
        "cross_document": False,
        "sources": sources,
        "tokenize_procs": 1,
        "validation": {"shards": str(raw), "every_steps": 4, "rows": 20},
    }
    length = {"steps": 8, "global_batch": 24, "micro_batch": 3}
    return run_values(
        corpus,
        root,
        name,
        model=LLAMA,
        schedule={"name": "constant"},
        **{"data": data, "train": length, "checkpoint": {"keep_last": 9, "every_minutes": None}}
        | sections,
    )


@pytest.mark.slow
def test_a_run_on_raw_text_goes_back_without_the_rows_of_a_step(
    corpus: Path, raw: Path, tmp_path: Path
) -> None:
    def of(name: str, policy: str) -> dict[str, Any]:
        saves = {"every_steps": 2, "every_minutes": None, "keep_last": 9}
        return values(corpus, raw, tmp_path, name, health={"policy": policy}, checkpoint=saves)

    exact = ("loss", "grad_norm", "batch_digest", "source_epoch", "validation_loss")
    check_rewind(of, rows=(96, 120), exact=exact)


@pytest.mark.slow
def test_two_ranks_then_one_then_four_are_one_uninterrupted_run(
    corpus: Path, raw: Path, tmp_path: Path
) -> None:
    [whole] = run_ranks(train, 1, values(corpus, raw, tmp_path, "whole"))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values(corpus, raw, tmp_path, "run")))
    for procs, steps in [(2, 3), (1, 4), (4, 8)]:
        hfscale("pretrain", config, "--procs", procs, f"train.steps={steps}")
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == list(range(1, 9))
    for name in ("batch_digest", "epoch", "source_epoch", "tokens_seen"):
        assert [record[name] for record in records] == [record[name] for record in whole]
    assert records[-1]["validation_loss"] == pytest.approx(whole[-1]["validation_loss"], rel=1e-4)
    assert all(record["source_loss"]["web"] > 0 for record in records)
    for step in (1, 3, 4, 8):  # from step 0, from the checkpoint of step 3 and from that of step 4
        rebuilt = rebuild(tmp_path / "run", step=step)
        assert rebuilt.digest == rebuilt.logged == records[step - 1]["batch_digest"]
    texts = [file.read_text("utf-8") for file in (corpus / "text").iterdir()]
    rows = [
        row for row in rebuilt.rows if row.source == "web" and row.documents[0] == row.documents[1]
    ]
    assert len(rows) > 5
    for row in rows:
        assert row.shard.startswith("raw-") and row.member.endswith(".json")
        text = next((t for t in texts if row.text.removesuffix("<|endoftext|>") in t), None)
        assert text is not None or set(row.text) <= set("训练数据，\ufffd")
    printed = hfscale("batch", tmp_path / "run", "--step", 8).stdout
    assert "equals the logged one" in printed and rows[0].member in printed
    refused = hfscale(
        "pretrain",
        config,
        "train.steps=9",
        "train.global_batch=32",
        "train.micro_batch=4",
        check=False,
    )
    assert refused.returncode == 2 and "train.global_batch=24 or 48" in refused.stderr


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.steps=null", "train.epochs=1"], "train.tokens"),
        (["data.lanes=5"], "data.lanes=4 or 6"),
        (["data.sources.0.max_epochs=2"], "max_epochs of source web"),
        (["data.sources.0.weight=1e-9"], "the weight of web is too small"),
    ],
)
def test_what_raw_text_cannot_do_is_refused_before_a_rank_starts(
    corpus: Path, raw: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values(corpus, raw, tmp_path, "run")))
    with pytest.raises(ConfigError, match=re.escape(says)):
        launch(Training(Request(str(config), tuple(overrides))))
    assert not (tmp_path / "run").exists()
