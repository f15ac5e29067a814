"""Every format gives the same documents in the same order; what cannot be read is named or
counted.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.corpus import Split, TextSource
from hfscale.corpus.source import open_corpus, pieces_of
from hfscale.corpus.split import assign, side_of
from hfscale.errors import DataError
from hfscale.shards.counts import Counts, seen_line

TEXTS = ['first, "quoted"\nline', "第二个文件", "third"]


def read(path: Path | str, **options: Any) -> list[str]:
    return list(open_corpus(TextSource(path=str(path), **options)).documents())


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_all_formats_agree(tmp_path: Path) -> None:
    import csv

    import pyarrow
    import pyarrow.parquet

    rows = [{"id": k, "text": text, "meta": {"body": text}} for k, text in enumerate(TEXTS)]
    lines = "\n".join(json.dumps(row, ensure_ascii=k == 0) for k, row in enumerate(rows))
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *([k, text] for k, text in enumerate(TEXTS))])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_tar(
        tmp_path / "a.tar",
        {
            f"{k}.{e}": d
            for k, t in enumerate(TEXTS)
            for e, d in (("json", json.dumps({"text": t}).encode()), ("txt", t.encode()))
        },
    )
    (tmp_path / "folder").mkdir()
    for k, text in enumerate(TEXTS):
        (tmp_path / "folder" / f"{k}.txt").write_text(text)
    assert read(tmp_path / "a.jsonl", format="jsonl") == TEXTS
    assert read(tmp_path / "a.jsonl.gz", format="jsonl", field="meta.body") == TEXTS
    assert read(tmp_path / "a.csv", format="csv") == TEXTS
    assert read(tmp_path / "a.parquet", format="parquet") == TEXTS
    assert read(tmp_path / "a.parquet", format="parquet", field="meta.body") == TEXTS
    assert read(tmp_path / "a.tar", format="webdataset", field="txt") == TEXTS
    assert read(tmp_path / "a.tar", format="webdataset", field="json.text") == TEXTS
    assert read(tmp_path / "folder") == TEXTS
    assert read(tmp_path / "folder" / "[01].txt") == TEXTS[:2]
    assert read(tmp_path / "folder" / "1.txt") == TEXTS[1:2]


def test_a_data_set_goes_through_datasets(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    assert read(tmp_path, format="hub") == TEXTS
    with pytest.raises(DataError, match="cannot open the data set"):
        read(tmp_path / "nothing", format="hub")


def test_files_are_chosen_and_ordered_by_path(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a/tests/t.py", "a.txt", ".git/hidden.py", "Z.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path, pattern="**/*.py, *.txt", exclude="*/tests/*") == [
        "Z.py",
        "a.txt",
        "a/z.py",
        "b.py",
    ]


def test_a_long_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    text = "一行文字 and more\n" * 1000  # of 22 bytes
    (tmp_path / "long.txt").write_text(text)
    pieces = read(tmp_path / "long.txt", document_mb=0.009)
    assert len(pieces) == 3
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)


def linked(root: Path, name: str, target: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(target)


def test_links_are_followed_and_what_they_lose_is_said(tmp_path: Path) -> None:
    """Links to folders and files count, circles end where they close, dead links are named; the
    same on every Python.
    """
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "a", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text(f"text of {folder.name}")
    linked(root, "b", "../elsewhere")
    linked(root, "c.txt", "a/x.txt")
    linked(root, "a/up", "..")  # a circle
    linked(root, "self", "self")
    linked(root, "dead.txt", "nowhere")
    os.mkfifo(root / "pipe.txt")
    corpus, counts = open_corpus(TextSource(path=str(root))), Counts()
    names = [file.relative_to(root).as_posix() for file in corpus.files]
    assert names == ["a/x.txt", "b/deep/x.txt", "c.txt"]
    assert len(list(corpus.documents(counts))) == 3
    assert counts.names == {"missing": ["dead.txt", "pipe.txt", "self"]}
    assert read(root, pattern="*/*.txt") == read(root / "a" / "*.txt") == ["text of a"]
    assert read(root / "**" / "deep" / "*") == ["text of deep"]
    with pytest.raises(DataError, match="not a pattern"):
        read(root, pattern="../*")


@pytest.mark.parametrize("sign", ["x", "\r", "字", "🙂", "xé\r"])
def test_text_without_line_ends_is_cut_between_characters(tmp_path: Path, sign: str) -> None:
    text = sign * 5000
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": text}, ensure_ascii=False) + '\n{"text": "short"}'
    )
    for kind in ("txt", "jsonl"):
        how = {"format": "text" if kind == "txt" else kind, "document_mb": 0.002}
        *pieces, last = read(tmp_path / f"a.{kind}", **how)
        if kind == "jsonl":
            assert last == "short"
        else:
            pieces.append(last)
        assert "".join(pieces) == text
        assert max(len(piece.encode()) for piece in pieces[:-1]) <= 2000
        assert len(pieces) > 1


@pytest.mark.parametrize("seed", range(4))
def test_texts_with_line_ends_are_cut_where_they_always_were(seed: int) -> None:
    """Pieces of the limit, and on to the end of their last line: as long as no line is longer than
    the limit.
    """
    draw = random.Random(seed)
    lines = [b"a" * draw.randrange(90) + b"\n" for _ in range(200)]
    data, limit = b"".join(lines) + b"b" * draw.randrange(90), 100
    stream, expected = io.BytesIO(data), []
    while piece := stream.read(limit):
        expected.append(piece + (stream.readline() if len(piece) == limit else b""))
    assert [piece for _, piece in pieces_of(io.BytesIO(data), limit)] == expected


def test_a_row_that_is_too_large_to_be_held_is_refused_by_name(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    text = "x" * 40_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "a.csv").write_text(f"text\n{text}\n")
    write_tar(tmp_path / "a.tar", {"0.txt": text.encode()})
    rows = [{"text": "".join(random.Random(0).choices("abcdefgh", k=40_000))}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    kinds = {"jsonl": "jsonl", "csv": "csv", "parquet": "parquet", "tar": "webdataset"}
    for suffix, kind in kinds.items():
        how: dict[str, Any] = {"format": kind, "document_mb": 0.002}
        how["field"] = "txt" if suffix == "tar" else "text"
        with pytest.raises(DataError, match=rf"larger than(?s:.*)a\.{suffix}(?s:.*)document_mb"):
            read(tmp_path / f"a.{suffix}", **how)


def test_packed_and_empty_files_and_bad_pieces_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd1234")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes((b"a" * 9 + b"\n") * 300 + b"\xff\n")
    (tmp_path / "d.txt").write_text("kept")
    corpus, counts = open_corpus(TextSource(path=str(tmp_path), document_mb=0.002)), Counts()
    texts = list(assign(corpus.documents(counts), Split(), counts, at=corpus.at))
    assert len(texts) == 2
    assert counts.names == {
        "packed": ["a.zst (zstd)"],
        "empty": ["b.txt"],
        "undecodable": ["c.txt, bytes 2,010 to 3,002"],
    }
    assert seen_line(counts.record()) == (
        "5 documents read; left out: 0 duplicates, 1 empty (b.txt), 0 invalid (half of a "
        "character), 1 not UTF-8 "
        "(c.txt, bytes 2,010 to 3,002), 1 packed otherwise than .gz (a.zst (zstd)); kept: 2"
    )


def test_files_that_are_not_utf8_are_counted_with_examples(tmp_path: Path) -> None:
    for k in range(5):
        (tmp_path / f"{k}.txt").write_bytes(b"caf\xe9" if k else "\ufeffcafé".encode())
    corpus, counts = open_corpus(TextSource(path=str(tmp_path))), Counts()
    assert list(corpus.documents(counts)) == ["café"]  # without the byte order mark
    assert counts.undecodable == 4
    assert counts.names == {"undecodable": [f"{k}.txt" for k in range(1, 5)]}


@pytest.mark.parametrize(
    ("name", "data", "options", "says"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": ',
            {"format": "jsonl"},
            r"not a JSON line(?s:.*)a.jsonl:2",
        ),
        (
            "a.jsonl",
            b'{"test": "x"}',
            {"format": "jsonl"},
            r"no field 'text'(?s:.*)a.jsonl:1(?s:.*)did you mean test",
        ),
        ("a.jsonl", b'{"text": 3}', {"format": "jsonl"}, r"not text(?s:.*)value:  3"),
        ("a.jsonl", b'"text"', {"format": "jsonl"}, "no field 'text'"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 9999)[:-20],
            {"format": "jsonl"},
            "cannot read a source file",
        ),
        (
            "a.csv",
            b"id,text\n1,caf\xe9\n",
            {"format": "csv"},
            r"not UTF-8(?s:.*)a.csv:2",
        ),
        ("a.csv", b"id,body\n1,x\n", {"format": "csv"}, "no field 'text'"),
        ("a.parquet", b"PAR1", {"format": "parquet"}, "not a readable parquet file"),
        ("a.tar", b"", {"format": "webdataset", "field": "txt"}, "not a readable tar"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, data: bytes, options: dict[str, Any], says: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        read(tmp_path / name, **options)


def test_null_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}')
    assert read(tmp_path / "a.jsonl", format="jsonl") == [""]


def test_an_unreadable_file_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose parents are root's alone
        folder, user = Path(name), os.geteuid()
        folder.chmod(0o755)
        (folder / "secret.txt").write_text("x")
        assert read(folder) == ["x"]  # what it imports is imported by now
        (folder / "secret.txt").chmod(0)
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            with pytest.raises(DataError, match=r"Permission denied(?s:.*)secret.txt"):
                read(folder)
        finally:
            os.seteuid(user)


def test_missing_and_unmatched_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path, pattern="*.txt")


@pytest.mark.parametrize("cut", ["member boundary", "header", "payload", "flipped header byte"])
def test_a_damaged_tar_is_an_error_not_the_end_of_the_data(tmp_path: Path, cut: str) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{k}.txt": b"x" * 700 for k in range(9)})
    data = bytearray(path.read_bytes())
    third = 3 * (512 + 1024)
    if cut == "flipped header byte":
        data[third + 100] ^= 1
    else:
        del data[third + {"member boundary": 0, "header": 100, "payload": 700}[cut] :]
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"tar.*(cut short|closing zero block|readable)(?s:.*)a.tar"
    ):
        read(path, format="webdataset", field="txt")


def test_a_document_never_changes_sides_and_a_duplicate_goes() -> None:
    texts = [f"document {k}" for k in range(2000)]
    split, counts = Split(validation=0.1), Counts()
    sides = {
        document.text: document.side
        for document in assign([*texts, "", *texts[:7], "\ud800"], split, counts)
    }
    assert (counts.documents, counts.duplicates, counts.empty, counts.invalid) == (2009, 7, 1, 1)
    assert 150 < sum(side == "validation" for side in sides.values()) < 250
    fewer = {
        document.text: document.side for document in assign(reversed(texts[::3]), split, Counts())
    }
    assert all(sides[text] == side for text, side in fewer.items())
    wider = {d.text: d.side for d in assign(texts, Split(validation=0.2), Counts())}
    assert all(wider[text] == "validation" for text, side in sides.items() if side == "validation")
    salted = {d.text: d.side for d in assign(texts, Split(validation=0.1, salt="other"), Counts())}
    assert salted != sides
    assert side_of(b"any", Split(validation=0.0)) == "train"
