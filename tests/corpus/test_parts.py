"""A build in parts comes to the bytes of a build by one process, in whatever order, and however
often it is interrupted.
"""

from __future__ import annotations

import fcntl
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.corpus import CorpusConfig, TextSource
from hfscale.corpus.build import build_part, build_shards
from hfscale.corpus.source import open_corpus
from hfscale.corpus.tokenizer_training import train_tokenizer
from hfscale.errors import DataError

COUNT = 3


def config(folder: Path, out: str, **source: Any) -> CorpusConfig:
    return CorpusConfig.model_validate(
        {
            "source": {"path": str(folder / "text"), **source},
            "split": {"validation": 0.2},
            "tokenizer": {"path": str(folder / "tokenizer"), "vocab_size": 400},
            "shards": {"path": str(folder / out), "shard_mb": 0.02, "chunk_mb": 0.005, "procs": 1},
        }
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/*"))}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 documents in two languages, two longer than a shard, three again at the other end, one
    empty, one not UTF-8; a tokenizer.
    """
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(5)
    (folder / "text").mkdir()
    for k in range(90):
        words = rng.choices(
            ["shard", "token", "学习", "模型", "loss", "\n"],
            k=20_000 if k in (10, 70) else rng.randint(1, 600),
        )
        (folder / "text" / f"{k:03d}.txt").write_text(f"{k} " + " ".join(words))
    for k in (3, 40, 10):
        shutil.copy(folder / "text" / f"{k:03d}.txt", folder / "text" / f"9{k:02d}.txt")
    (folder / "text" / "050b.txt").write_text(" \n")
    (folder / "text" / "080b.txt").write_bytes(b"caf\xe9")
    train_tokenizer(config(folder, "shards"))
    build_shards(config(folder, "shards"))
    return folder


def test_parts_in_any_order_come_to_the_same_bytes(corpus: Path) -> None:
    settings = config(corpus, "parts")
    parts = corpus / "parts-parts"
    assert build_part(settings, number=2, count=COUNT) == ({}, [0, 1])
    assert build_part(settings, number=0, count=COUNT) == ({}, [1])
    assert build_part(settings, number=0, count=COUNT) == ({}, [1]), (
        "a part that is built is left alone"
    )
    assert not settings.shards.path.exists()
    assert len(list(parts.glob("*/train/*.tar"))) >= 4
    built, missing = build_part(settings, number=1, count=COUNT)
    assert missing == []
    assert content(settings.shards.path) == content(corpus / "shards")
    seen = built["train"].source["seen"]
    assert {name: count for name, count in seen.items() if name != "names"} == {
        "documents": 95,
        "duplicates": 3,
        "empty": 1,
        "invalid": 0,
        "undecodable": 1,
        "packed": 0,
        "missing": 0,
    }
    assert seen["names"].keys() == {"empty", "undecodable"}
    assert not parts.exists(), "they are merged"
    again, _ = build_part(settings, number=0, count=COUNT)
    assert again == built
    assert build_shards(settings) == built
    assert not parts.exists()


@pytest.mark.parametrize("leave", [1, 2, 6])
def test_a_merge_that_was_killed_goes_on(corpus: Path, leave: int) -> None:
    """The ledger holds ``leave`` lines, as one that was killed leaves it. Meanwhile, another
    process is at work there.
    """
    settings = config(corpus, f"killed-{leave}")
    whole, path = corpus / "shards", settings.shards.path
    shutil.copytree(whole, path, ignore=shutil.ignore_patterns("manifest.json"))
    lines = (whole / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > leave + 1
    (path / "ledger.jsonl").write_bytes(b"".join(lines[:leave]) + lines[leave][:9])
    ahead = {f"{line['side']}/{line['shard']['name']}" for line in map(json.loads, lines[leave:-1])}
    (path / min(ahead)).write_bytes(b"half")
    with open(path / "ledger.jsonl", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert [build_part(settings, number=number, count=2) for number in (1, 0)] == [
            ({}, [0]),
            ({}, []),
        ]
    build_part(settings, number=1, count=2)
    assert content(path) == content(whole)


def test_parts_of_two_sources_are_not_merged(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "text", tmp_path / "text")
    shutil.copytree(corpus / "tokenizer", tmp_path / "tokenizer")
    settings = config(tmp_path, "shards")
    build_part(settings, number=0, count=2)
    (tmp_path / "text" / "0.txt").write_text("one file more")
    with pytest.raises(
        DataError, match="a part was built from something else(?s:.*)shards-parts/0-of-2"
    ):
        build_part(settings, number=1, count=2)


@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_each_file_is_in_one_part_and_their_order_stays(corpus: Path, count: int) -> None:
    whole = open_corpus(config(corpus, "shards").source)
    parts = [whole.part(number, count) for number in range(count)]
    assert [file for part in parts for file in part.files] == whole.files
    largest = max(file.stat().st_size for file in whole.files)
    assert all(part.total_bytes <= whole.total_bytes / count + largest for part in parts)


def test_a_data_set_of_the_hub_has_no_parts() -> None:
    with pytest.raises(DataError, match="cannot be built in parts"):
        open_corpus(TextSource(format="hub", path="org/name")).part(0, 2)
