"""Shards written and read back: any range, any document end, and every kind of damage is named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfscale.errors import DataError
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.reader import ShardReader
from hfscale.shards.writer import ShardWriter


def write(
    folder: Path,
    documents: list[np.ndarray],
    *,
    chunk: int = 64,
    chunks: int = 3,
    dtype: str = "<u2",
) -> list[ShardEntry]:
    entries: list[ShardEntry] = []
    writer = ShardWriter(
        folder,
        name="s",
        dtype=np.dtype(dtype),
        chunk_tokens=chunk,
        shard_chunks=chunks,
        committed=entries.append,
    )
    for document in documents:
        writer.add(document)
    writer.close()
    return entries


def some_documents(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 60_000, length).astype("<u2") for length in lengths]


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, list[ShardEntry], list[np.ndarray]]:
    documents = some_documents([10, 54, 1, 300, 64, 7, 191, 2])
    return tmp_path, write(tmp_path, documents), documents


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=20), data=st.data())
def test_any_range_and_its_ends_come_back(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    documents = some_documents(lengths)
    entries = write(folder, documents)
    stream, stream_ends = np.concatenate(documents), np.cumsum(lengths)
    assert sum(e.tokens for e in entries) == len(stream)
    assert sum(e.documents for e in entries) == len(documents)
    assert max(e.max_id for e in entries) == stream.max()
    base = 0
    for entry in entries:
        reader = ShardReader(folder, entry, dtype=np.dtype("<u2"))
        start = data.draw(st.integers(0, len(reader)))
        stop = data.draw(st.integers(start, len(reader)))
        for out in (np.empty(stop - start, np.int64), np.empty(stop - start, np.int32)):
            reader.read_tokens(start, stop, out)
            assert (out == stream[base + start : base + stop]).all()
        expected = stream_ends[(stream_ends > base) & (stream_ends <= base + len(reader))] - base
        assert reader.ends().tolist() == expected.tolist()
        if start < len(reader):
            member, document = reader.locate(start)
            assert member == f"{start // 64:09d}.tokens.bin"
            assert document == ((stream_ends > base) & (stream_ends <= base + start)).sum()
        base += entry.tokens


def test_a_shard_is_plain_ustar_that_webdataset_reads(
    shards: tuple[Path, list[ShardEntry], list[np.ndarray]],
) -> None:
    import webdataset

    folder, entries, documents = shards
    path = folder / entries[0].name
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uname, m.uid, m.offset_data % 512) for m in members} == {
            (0, "hfscale", 0, 0)
        }
    assert path.read_bytes()[257:265] == b"ustar\x0000"
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    tokens = np.concatenate([np.frombuffer(s["tokens.bin"], "<u2") for s in samples])
    assert (tokens == np.concatenate(documents)[:192]).all()
    assert np.load(io.BytesIO(samples[0]["ends.npy"])).tolist() == [10, 64]


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, some_documents([100, 500, 3])) for name in "ab")
    assert first == second
    for entry in first:
        for name in (entry.name, entry.index_name):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not list(tmp_path.glob("*/.*"))


def test_uint32_ids_survive(tmp_path: Path) -> None:
    ids = np.array([0, 70_000, 2**31], "<u4")
    (entry,) = write(tmp_path, [ids], dtype="<u4")
    out = np.empty(3, np.int64)
    ShardReader(tmp_path, entry, dtype=np.dtype("<u4")).read_tokens(0, 3, out)
    assert out.tolist() == ids.tolist()
    assert entry.max_id == 2**31


def read_all(folder: Path, entry: ShardEntry, *, verify: bool = True) -> np.ndarray:
    reader = ShardReader(folder, entry, dtype=np.dtype("<u2"), verify=verify)
    out = np.empty(len(reader), np.int64)
    reader.read_tokens(0, len(reader), out)
    reader.ends()
    return out


def test_a_flipped_byte_is_named_with_member_and_offset(
    shards: tuple[Path, list[ShardEntry], list[np.ndarray]],
) -> None:
    folder, entries, _ = shards
    path = folder / entries[1].name
    with tarfile.open(path) as tar:
        member = tar.getmember("000000001.tokens.bin")
    data = bytearray(path.read_bytes())
    data[member.offset_data + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        DataError,
        match=rf"000000001.tokens.bin at offset {member.offset_data:,} (?s:.*)s-000001.tar",
    ):
        read_all(folder, entries[1])
    read_all(folder, entries[0])
    read_all(folder, entries[1], verify=False)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda tar, idx: tar.write_bytes(tar.read_bytes()[:-512]), "bytes, its manifest says"),
        (lambda tar, idx: tar.unlink(), "cannot be read: No such file"),
        (lambda tar, idx: tar.write_bytes(b""), "cannot be read"),
        (lambda tar, idx: idx.unlink(), "index of a shard cannot be read"),
        (lambda tar, idx: idx.write_bytes(idx.read_bytes()[:-3]), "index of a shard is damaged"),
        (lambda tar, idx: idx.write_bytes(b""), "index of a shard is damaged"),
        (
            lambda tar, idx: idx.write_bytes((idx.parent / "s-000001.idx").read_bytes()),
            "belongs to another shard",
        ),
    ],
)
def test_damage_is_found_when_a_shard_is_opened(
    shards: tuple[Path, list[ShardEntry], list[np.ndarray]], damage: object, says: str
) -> None:
    folder, entries, _ = shards
    damage(folder / entries[0].name, folder / entries[0].index_name)  # type: ignore[operator]
    with pytest.raises(DataError, match=says):
        read_all(folder, entries[0])


def manifest(entries: list[ShardEntry]) -> Manifest:
    return Manifest(
        dtype="uint16",
        tokenizer=TokenizerInfo("ab", 60_000, 0),
        source={"format": "text"},
        shards=tuple(entries),
    )


def test_a_manifest_comes_back_with_its_fingerprint(
    shards: tuple[Path, list[ShardEntry], list[np.ndarray]],
) -> None:
    folder, entries, documents = shards
    saved = manifest(entries)
    path = saved.save(folder)
    for loaded in (Manifest.load(path), Manifest.load(str(folder))):
        assert loaded == saved
        assert loaded.fingerprint == saved.fingerprint
        assert loaded.folder == folder
        assert loaded.tokens == sum(map(len, documents))
    assert manifest(entries[:1]).fingerprint != saved.fingerprint


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "should be an object"),
        ('{"version": 99}', "unknown version"),
        ('{"version": 1}', "damaged: dtype: field required"),
        (
            '{"version": 1, "dtype": "int7", "tokenizer": null, "source": {}, "shards": []}',
            "unknown dtype",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=says):
        Manifest.load(tmp_path)


def test_a_missing_manifest_names_the_splits_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shards build"):
        Manifest.load(tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    manifest([]).save(tmp_path / "train")
    with pytest.raises(DataError, match="holds train"):
        Manifest.load(tmp_path)
