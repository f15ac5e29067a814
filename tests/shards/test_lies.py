"""Manifests, indexes and tars that lie under good checksums."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from hfscale.errors import DataError
from hfscale.shards.index import MEMBER
from hfscale.shards.manifest import Manifest
from hfscale.shards.reader import ShardReader
from hfscale.shards.tables import table_rows
from hfscale.shards.tars import walk
from hfscale.shards.verify import verify
from tests.helpers.damage import write_shards


def read_all(folder: Path) -> np.ndarray:
    manifest = Manifest.load(folder)
    entry = manifest.shards[0]
    ids = np.empty(entry.tokens, np.int64)
    reader = ShardReader(folder, entry, dtype=manifest.numpy_dtype)
    reader.read_tokens(0, entry.tokens, ids)
    reader.ends()
    return ids


def lie(folder: Path, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """Change the members of the first index, and give it a good checksum."""
    file = folder / "s-000000.idx"
    body = file.read_bytes()[:-8]
    members = np.frombuffer(body, MEMBER, offset=48).copy()
    changed = change(members)
    members = members if changed is None else changed
    body = body[:40] + len(members).to_bytes(8, "little") + members.tobytes()
    file.write_bytes(body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"))


def put(name: str, number: int, value: int) -> Callable[[np.ndarray], None]:
    def change(members: np.ndarray) -> None:
        members[name][number] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("offset", 1, 2**63), r"damaged: member 1: offset 9,223,372"),
        (put("tokens", 1, 2**64 - 1), r"damaged: member 1: tokens"),
        (put("bytes", 0, 2**40), "more than the shard has bytes"),
        (put("documents", 0, 5), "the index counts"),
        (lambda members: members[:3], "a chunk without its tokens"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change: Callable, says: str):
    write_shards(tmp_path)
    lie(tmp_path, change)
    with pytest.raises(DataError, match=says):
        read_all(tmp_path)


def test_an_index_that_counts_fewer_documents_than_there_are_ends(tmp_path: Path):
    write_shards(tmp_path)
    lie(tmp_path, put("documents", 0, 7))
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["shards"][0]["documents"] -= 1
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="other documents than the chunks hold ends"):
        read_all(tmp_path)
    found = verify(Manifest.load(tmp_path), threads=1)
    assert any("other documents than the chunks hold ends" in finding for finding in found), found


def test_ids_beyond_what_the_manifest_says(tmp_path: Path):
    write_shards(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["shards"][0]["max_id"] = 100
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="holds the id [0-9]+, the manifest says max_id 100"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("name", 5, r"shards\.0\.name: .*not 5"),
        ("tokens", True, r"shards\.0\.tokens: .*not True"),
        ("bytes", -1, r"shards\.0\.bytes: .*not -1"),
        ("documents", 2**70, r"shards\.0\.documents"),
        ("name", "s-000001.tar", "is there twice"),
    ],
)
def test_a_manifest_that_lies(tmp_path: Path, key: str, value: object, says: str):
    write_shards(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["shards"][0][key] = value
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=says):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("levels", [201, 900, 50_000])
@pytest.mark.parametrize("sign", ["[", '{"a":'])
def test_a_row_that_is_too_deep(tmp_path: Path, levels: int, sign: str):
    close = {"[": "]", '{"a":': "}"}[sign]
    row = '{"text": "a", "x": ' + sign * levels + "1" + close * levels + "}"
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a"}}\n{row}\n')
    with pytest.raises(DataError, match=r"not a JSON line[\s\S]*rows.jsonl:2"):
        list(table_rows(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    "size",
    [b"\xff" * 10 + b"\xf8\x00", b"\xff" * 12, b"zzzzzzzzzzz\0"],
)
def test_a_tar_with_an_impossible_size(tmp_path: Path, size: bytes):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "b.txt"):
            tar.addfile(tarfile.TarInfo(name))
    data = bytearray(path.read_bytes())
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with pytest.raises(DataError):
        list(walk(path))
