"""Verification finds every kind of damage in one report; statistics and the index of foreign
tars.
"""

from __future__ import annotations

import io
import math
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import xxhash

from hfscale.errors import DataError, UserError
from hfscale.shards.index import ShardIndex
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.raw import index_tars
from hfscale.shards.reader import ShardReader
from hfscale.shards.stats import describe, document_lengths, draw, histogram, unigram_entropy
from hfscale.shards.verify import manifests_at, verify
from hfscale.shards.writer import ShardWriter
from tests.helpers.needs import lacking

EOD = 0


def make(folder: Path, documents: list[list[int]], vocab_size: int = 50) -> Manifest:
    entries: list[ShardEntry] = []
    writer = ShardWriter(
        folder,
        name="s",
        dtype=np.dtype("<u2"),
        chunk_tokens=16,
        shard_chunks=2,
        committed=entries.append,
    )
    for document in documents:
        writer.add(np.array([*document, EOD], "<u2"))
    writer.close()
    manifest = Manifest(
        dtype="uint16",
        tokenizer=TokenizerInfo("t", vocab_size, EOD),
        source={},
        shards=tuple(entries),
        folder=folder,
    )
    manifest.save(folder)
    return manifest


DOCUMENTS = [[3] * 5, [4, 5] * 20, [6], [7] * 30, [49] * 12]


def test_good_shards_have_no_findings_and_all_bytes_are_counted(tmp_path: Path) -> None:
    manifest = make(tmp_path / "train", DOCUMENTS)
    seen: list[int] = []
    assert verify(manifest, threads=2, advance=seen.append) == []
    assert sum(seen) == manifest.bytes
    assert [m.folder.name for m in manifests_at(tmp_path)] == ["train"]
    assert (
        manifests_at(tmp_path / "train")
        == manifests_at(tmp_path / "train" / "manifest.json")
        == [manifest]
    )


def test_all_damage_is_in_one_report(tmp_path: Path) -> None:
    manifest = make(tmp_path, DOCUMENTS)
    names = [entry.name for entry in manifest.shards]
    flipped = bytearray((tmp_path / names[0]).read_bytes())
    offset = int(ShardIndex.load(tmp_path / "s-000000.idx").tokens[1]["offset"])
    flipped[offset] ^= 1
    (tmp_path / names[0]).write_bytes(flipped)
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:1536])
    (tmp_path / names[2]).unlink()
    findings = "\n".join(verify(manifest, threads=2))
    assert (
        f"s-000000.tar: member 000000001.tokens.bin at offset {offset:,} does not match" in findings
    )
    assert "s-000001.tar: has 1,536 bytes" in findings
    assert "s-000002.tar: the shard is missing" in findings


def test_what_checksums_cannot_see_is_found(tmp_path: Path) -> None:
    assert "outside the vocabulary of 40" in "".join(
        verify(make(tmp_path / "a", DOCUMENTS, vocab_size=40), threads=1)
    )
    manifest = make(tmp_path / "b", DOCUMENTS)
    other_eod = Manifest(
        dtype="uint16",
        tokenizer=TokenizerInfo("t", 50, 9),
        source={},
        shards=manifest.shards,
        folder=manifest.folder,
    )
    assert "does not end with the end-of-document id" in "".join(verify(other_eod, threads=1))
    first = manifest.shards[0]
    wrong = ShardEntry(**{**vars(first), "documents": first.documents + 1})
    miscounted = Manifest(
        dtype="uint16",
        tokenizer=manifest.tokenizer,
        source={},
        shards=(wrong,),
        folder=manifest.folder,
    )
    assert "its manifest says" in "".join(verify(miscounted, threads=1))


def test_lengths_cross_chunks_and_shards(tmp_path: Path) -> None:
    manifest = make(tmp_path, DOCUMENTS)
    assert document_lengths(manifest).tolist() == [6, 41, 2, 31, 13]
    text = describe(manifest)
    assert "tokens     93 (uint16)" in text
    assert [line.split()[3] for line in text.splitlines() if "#" in line] == [
        "1",
        "1",
        "1",
        "1",
        "1",
    ]


def test_lengths_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make(tmp_path, DOCUMENTS)
    assert histogram(np.array([1, 2, 3, 4, 41])).tolist() == [1, 2, 1, 0, 0, 1]
    picture = tmp_path / "lengths.png"
    draw({"train": manifest}, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"cannot write the picture[\s\S]*no/where"):
        draw({"train": manifest}, tmp_path / "no" / "where.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"needs matplotlib[\s\S]*pip install matplotlib"):
        draw({"train": manifest}, picture)


def test_unigram_entropy_is_the_smoothed_cross_entropy(tmp_path: Path) -> None:
    train, validation = (
        make(tmp_path / "t", [[1, 1, 2]], vocab_size=4),
        make(tmp_path / "v", [[1, 3]], vocab_size=4),
    )
    p = {0: 2 / 8, 1: 3 / 8, 2: 2 / 8, 3: 1 / 8}  # counts 1, 2, 1, 0, plus one each
    assert unigram_entropy(train, validation) == pytest.approx(
        -sum(math.log(p[i]) for i in (1, 3, 0)) / 3
    )
    with pytest.raises(DataError, match="different tokenizers"):
        unigram_entropy(train, make(tmp_path / "w", [[1]], vocab_size=5))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars_of_others_are_indexed_as_webdataset_groups_them(tmp_path: Path) -> None:
    import webdataset

    tars = [
        write_tar(
            tmp_path / f"raw-{k}.tar",
            {f"d/{k}{i}.{e}": f"文 {k}{i} {e}".encode() for i in range(5) for e in ("json", "txt")},
        )
        for k in range(2)
    ]
    before = [tar.read_bytes() for tar in tars]
    manifest = index_tars(tars, folder=tmp_path / "index", field=None, threads=2)
    assert manifests_at(tmp_path / "index") == [manifest]
    assert (manifest.dtype, manifest.documents) == ("text", 10)
    for entry, tar in zip(manifest.shards, tars, strict=True):
        expected = [
            sample["txt"]
            for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)
        ]
        members = ShardIndex.load(manifest.folder / entry.index_name).members
        data = (manifest.folder / entry.name).read_bytes()
        assert [data[m["offset"] : m["offset"] + m["bytes"]] for m in members] == expected
    assert verify(manifest, threads=1) == []
    assert [tar.read_bytes() for tar in tars] == before
    assert index_tars(tars, folder=tmp_path / "index", field=None, threads=2) == manifest
    with pytest.raises(DataError, match="another manifest"):
        index_tars(tars[:1], folder=tmp_path / "index", field=None, threads=2)
    with pytest.raises(DataError, match="raw text"):
        document_lengths(manifest)


def test_tars_that_cannot_be_indexed_are_refused(tmp_path: Path) -> None:
    def index(members: dict[str, bytes], extension: str | None = None) -> None:
        index_tars(
            [write_tar(tmp_path / "x.tar", members)], folder=tmp_path, field=extension, threads=1
        )

    with pytest.raises(DataError, match=r"no text(?s:.*)sample a(?s:.*)'jpg'"):
        index({"a.jpg": b""})
    with pytest.raises(DataError, match=r"no text(?s:.*)did you mean txt"):
        index({"a.txt": b""}, "text")
    with pytest.raises(DataError, match="two members of one name"):
        index({"a.txt": b"1", "a.TXT": b"2"})
    with pytest.raises(DataError, match="not UTF-8"):
        index({"a.txt": b"\xff"})
    with pytest.raises(DataError, match="without samples"):
        index({})
    with pytest.raises(DataError, match="share an index"):
        index_tars(
            [write_tar(tmp_path / n / "x.tar", {"a.txt": b"x"}) for n in "ab"],
            folder=tmp_path,
            field=None,
            threads=1,
        )
    (tmp_path / "x.idx").write_bytes(b"of another program")
    with pytest.raises(DataError, match="index"):
        index({"a.txt": b"x"})
    assert (tmp_path / "x.idx").read_bytes() == b"of another program"


@pytest.mark.parametrize(
    ("name", "member", "value", "said"),
    [
        ("documents", 0, 0, "other documents than"),
        ("documents", 0, 2**62, "member 0: documents 4,611"),  # times four it is nothing
        ("tokens", 1, 2**63, "member 1: tokens 9,223"),  # twice that is nothing
        ("bytes", 1, 2**20, "more than the shard has bytes"),
        ("offset", 1, -1, "ends after the shard"),  # the last byte
    ],
)
def test_an_index_counts_what_is_there(
    tmp_path: Path, name: str, member: int, value: int, said: str
) -> None:
    """With a good checksum, as one who makes an index himself has it: it is neither read nor called
    good.
    """
    manifest = make(tmp_path, DOCUMENTS)
    [entry, *_] = manifest.shards
    path = tmp_path / entry.index_name
    index = ShardIndex.load(path)
    members = index.members.copy()
    members[name][member] = value if value >= 0 else entry.bytes + value
    ShardIndex(index.tar_digest, members).save(path)
    assert any(said in line for line in verify(manifest, threads=1, advance=lambda _: None))
    with pytest.raises(DataError, match=said):
        ShardReader(tmp_path, entry, dtype=manifest.numpy_dtype)


def test_an_index_has_the_members_that_it_says(tmp_path: Path) -> None:
    manifest = make(tmp_path, DOCUMENTS)
    path = tmp_path / manifest.shards[0].index_name
    body = bytearray(path.read_bytes()[:-8])
    body[40] += 1  # the count
    path.write_bytes(body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"))
    with pytest.raises(DataError, match=r"counts [0-9]+ members in"):
        ShardIndex.load(path)


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_sparse_member_is_refused_by_name(tmp_path: Path, form: str) -> None:
    """Its bytes are not stored as they are: its text would be that of the members after it."""
    with open(tmp_path / "a.txt", "wb") as file:
        file.write(b"begin")
        file.truncate(2**20)
        file.seek(2**20)
        file.write(b"end")
    (tmp_path / "b.txt").write_text("another text")
    tar = tmp_path / "x.tar"
    pack = ["tar", f"--format={form}", "-S", "-cf", str(tar), "-C", str(tmp_path), "a.txt", "b.txt"]
    subprocess.run(pack, check=True)
    if tar.stat().st_size > 2**19:
        lacking("a file system with holes")
    with pytest.raises(DataError, match="'.*a.txt'.* is sparse"):
        index_tars([tar], folder=tmp_path / "out", field="txt", threads=1)


@pytest.mark.parametrize("more", ["a tar", "garbage"])
def test_what_follows_the_end_of_a_tar_is_not_lost_without_a_word(
    tmp_path: Path, more: str
) -> None:
    first = write_tar(tmp_path / "a.tar", {"a.txt": b"one"})
    second = write_tar(tmp_path / "b.tar", {"b.txt": b"two"})
    added = second.read_bytes() if more == "a tar" else b"\0" * 700 + b"x"
    first.write_bytes(first.read_bytes() + added)
    with pytest.raises(DataError, match="more follows after the end of the tar"):
        index_tars([first], folder=tmp_path / "out", field="txt", threads=1)
