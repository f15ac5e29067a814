"""``shards cat``: any document or row comes back as the tokens that were written, and samples of
raw text by position and key.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from hfscale.errors import DataError
from hfscale.reports.cat import documents, find_tokenizer, rows, samples
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.raw import index_tars, samples_of
from hfscale.shards.writer import ShardWriter
from hfscale.tokenizer import load_tokenizer
from tests.helpers.cli import hfscale
from tests.shards.test_verify import write_tar

# the fourth document crosses shards of 32 tokens, one of which has no document's end
LENGTHS = [
    5,
    40,
    1,
    100,
    16,
    3,
    27,
]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Manifest, list[np.ndarray]]:
    entries: list[ShardEntry] = []
    writer = ShardWriter(
        tmp_path,
        name="s",
        dtype=np.dtype("<u2"),
        chunk_tokens=16,
        shard_chunks=2,
        committed=entries.append,
    )
    texts = [
        np.random.default_rng(k).integers(1, 99, length).astype("<u2")
        for k, length in enumerate(LENGTHS)
    ]
    for text in texts:
        writer.add(text)
    writer.close()
    manifest = Manifest(
        dtype="uint16",
        tokenizer=TokenizerInfo("t", 99, 0),
        source={},
        shards=tuple(entries),
        folder=tmp_path,
    )
    manifest.save(tmp_path)
    return manifest, texts


@pytest.mark.parametrize(("first", "count"), [(0, 7), (3, 1), (4, 99)])
def test_documents_come_back(
    written: tuple[Manifest, list[np.ndarray]], first: int, count: int
) -> None:
    manifest, texts = written
    assert 0 in [entry.documents for entry in manifest.shards]
    found = list(documents(manifest, first=first, count=count))
    assert [ids for _, ids in found] == [text.tolist() for text in texts[first : first + count]]
    if first == 3:
        assert found[0][0] == "document 3  s-000001.tar  000000000.tokens.bin  100 tokens from 14"


def test_rows_come_back(written: tuple[Manifest, list[np.ndarray]]) -> None:
    manifest, texts = written
    line = np.concatenate(texts)
    expected = [
        line[start + k * 10 : start + k * 10 + 10].tolist()
        for start in range(0, 192, 32)
        for k in range((min(32, 192 - start) - 1) // 10)
    ]
    found = list(rows(manifest, first=0, count=999, seq_len=10))
    assert [ids for _, ids in found] == expected
    assert list(rows(manifest, first=4, count=2, seq_len=10)) == found[4:6]
    assert found[4][0] == "row 4  s-000001.tar  10 tokens from 10"


def test_what_is_not_there_is_said(written: tuple[Manifest, list[np.ndarray]]) -> None:
    manifest, _ = written
    with pytest.raises(DataError, match=r"no such document[\s\S]*7[\s\S]*0 to 6"):
        list(documents(manifest, first=7, count=1))
    with pytest.raises(DataError, match=r"no such row[\s\S]*--row"):
        list(rows(manifest, first=-1, count=1, seq_len=10))
    with pytest.raises(DataError, match="is not beside them"):
        find_tokenizer(manifest, None)


def raw(folder: Path) -> Manifest:
    tars = []
    for name in "ab":
        tars.append(folder / f"{name}.tar")
        with tarfile.open(tars[-1], "w") as tar:
            for member in (f"d/{name}0.cls", f"d/{name}0.txt", f"d/{name}1.txt", "d/both.txt"):
                data = f"文 {name} {member}".encode()
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return index_tars(tars, folder=folder, field=None, threads=1)


def test_samples_come_by_position_and_key(tmp_path: Path) -> None:
    manifest = raw(tmp_path)
    everything = list(samples(manifest, first=0, count=99, key=None))
    assert [text for _, text in everything] == [
        f"文 {n} d/{m}.txt" for n in "ab" for m in (f"{n}0", f"{n}1", "both")
    ]
    assert everything[4][0] == "sample 4  b.tar  d/b1.txt"
    assert list(samples(manifest, first=4, count=1, key=None)) == [everything[4]]
    assert list(samples(manifest, first=0, count=1, key="d/b0")) == [everything[3]]
    assert list(samples(manifest, first=0, count=2, key="d/both")) == [everything[2], everything[5]]
    with pytest.raises(DataError, match="no sample has this key"):
        list(samples(manifest, first=0, count=1, key="d/none"))
    with pytest.raises(DataError, match=r"no such sample[\s\S]*0 to 5"):
        list(samples(manifest, first=6, count=1, key=None))
    (tmp_path / "a.idx").write_bytes((tmp_path / "b.idx").read_bytes())
    samples_of.cache_clear()  # another process would look again
    with pytest.raises(DataError, match="belongs to another shard"):
        list(samples(manifest, first=0, count=1, key=None))


def test_the_field_of_a_json_is_printed_not_the_json(tmp_path: Path) -> None:
    body = {"page": {"text": "训练\n数据", "more": 1}}
    tar = write_tar(tmp_path / "a.tar", {"x.json": json.dumps(body).encode()})
    manifest = index_tars([tar], folder=tmp_path, field="json.page.text", threads=1)
    assert list(samples(manifest, first=0, count=1, key=None)) == [
        ("sample 0  a.tar  x.json", "训练\n数据")
    ]
    tar.write_bytes(tar.read_bytes().replace(b"more", b"less"))
    with pytest.raises(
        DataError,
        match=r"sample 0 \(member x.json\): the text does not match its checksum[\s\S]*a\.tar",
    ):
        list(samples(manifest, first=0, count=1, key="x"))


@pytest.mark.slow
def test_the_command_prints_text(corpus: Path, tmp_path: Path) -> None:
    train = corpus / "shards" / "train"
    manifest = Manifest.load(train)
    done = hfscale("shards", "cat", train, "--document", 2, "--count", 2)
    assert done.stdout.count("--- document") == 2
    decoded = load_tokenizer(corpus / "tokenizer").decode(
        next(documents(manifest, first=2, count=1))[1]
    )
    assert str(decoded) in done.stdout
    assert (
        "tokens from 64"
        in hfscale("shards", "cat", train / "manifest.json", "--row", 2, "--seq-len", 32).stdout
    )
    raw(tmp_path)
    assert (
        hfscale("shards", "cat", tmp_path, "--key", "d/a1").stdout
        == "--- sample 1  a.tar  d/a1.txt\n文 a d/a1.txt\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--row", 1], "give one of"),
        (["--document", 1, "--key", "x"], "give one of"),
        (["--key", "x"], "documents, not keys"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--document", 10**6], "no such document"),
    ],
)
def test_mistakes_are_one_screen(corpus: Path, options: list[object], says: str) -> None:
    done = hfscale("shards", "cat", corpus / "shards" / "train", *options, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert says in done.stderr


def test_another_tokenizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(corpus / "shards" / "train")
    assert find_tokenizer(manifest, None).name_or_path == str(corpus / "tokenizer")
    content = (corpus / "tokenizer" / "tokenizer.json").read_text("utf-8")
    for file in (corpus / "tokenizer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(
        content.replace('"def"', '"fed"') if '"def"' in content else content.replace("Ġ", "Ģ")
    )
    with pytest.raises(DataError, match="another tokenizer"):
        find_tokenizer(manifest, str(tmp_path))
    done = hfscale("shards", "cat", corpus / "shards", check=False)
    assert done.returncode == 2 and "train and validation" in done.stderr
