"""Every format gives the same documents in the same order; what cannot be read is named or counted."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.schema import Split, TextSource
from hfscale.corpus.source import open_corpus
from hfscale.corpus.split import Counts, assign, side_of
from hfscale.errors import DataError

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


def test_files_that_are_not_utf8_are_counted_with_examples(tmp_path: Path) -> None:
    for k in range(5):
        (tmp_path / f"{k}.txt").write_bytes(b"caf\xe9" if k else "\ufeffcafé".encode())
    corpus = open_corpus(TextSource(path=str(tmp_path)))
    assert list(corpus.documents()) == ["café"]  # without the byte order mark
    assert (corpus.undecodable, corpus.examples) == (4, ["1.txt", "2.txt", "3.txt"])


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
            r"not a readable csv row(?s:.*)a.csv:2",
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
