"""Tables of others: read as they are meant, or refused by the name of the cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.corpus import TextSource
from hfscale.corpus.source import open_corpus
from hfscale.errors import DataError
from hfscale.shards.tables import hub_dataset, table_files, table_rows

ROWS = [{"text": "好的", "label": "a"}, {"text": 'x, "y"', "label": "b"}]
HEADED = "text;label\n好的;a\nplain;b\n"


def rows(path: Path) -> list[Any]:
    return [row for _, row in table_rows(path)]


@pytest.mark.parametrize(
    "data",
    [
        HEADED.encode(),
        HEADED.replace(";", "\t").encode(),
        ("sep=;\n" + HEADED).encode(),
        HEADED.replace(";", ",").replace("\n", "\r").encode(),
        HEADED.replace(";", ",").replace("\n", "\r\n").encode("utf-8-sig"),
        HEADED.replace(";", "\t").encode("utf-16"),
    ],
    ids=["semicolons", "tabs", "sep", "cr", "bom", "utf-16"],
)
def test_csv_of_others(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    assert rows(tmp_path / "a.csv") == [
        {"text": "好的", "label": "a"},
        {"text": "plain", "label": "b"},
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_over_several_lines_is_read(tmp_path: Path, indent: int | None) -> None:
    squad = {
        "data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}]
    }
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=indent), "utf-8")
    (tmp_path / "squad.json").write_text(json.dumps(squad, indent=indent), "utf-8")
    assert rows(tmp_path / "list.json") == ROWS
    if indent:
        source = TextSource(format="jsonl", path=str(tmp_path / "list.json"))
        assert list(open_corpus(source).documents()) == [row["text"] for row in ROWS]
    assert rows(tmp_path / "squad.json") == [{"context": "c", "question": "q", "answers": []}]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.csv", "text,label\n好的,真的\n".encode("gb18030"), r"GB18030[\s\S]*iconv -f gb18030"),
        ("a.csv", b"text,label,text\na,b,c\n", r"two columns have one name[\s\S]*'text'"),
        ("a.jsonl", b'{"label": 1, "label": 2}\n', r"the key 'label' is there twice"),
        ("a.csv", b"text,label\nx\ry,b\n", r"not a readable csv row[\s\S]*a.csv:2"),
        ("a.csv", b"PK\x03\x04....", r"packed \(zip\)"),
        ("a.csv", b"\x28\xb5\x2f\xfd...", r"packed \(zstd\)"),
        ("a.csv", b"PAR1....", r"a parquet file"),
        ("a.xlsx", b"PK\x03\x04....", r"a spreadsheet: save it as csv"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd...", r"pack it with gzip"),
        ("a.jsonl", b'{"text": "x"}\n{"text":\n"y"}\n', r"not a JSON line[\s\S]*a.jsonl:2"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        rows(tmp_path / name)


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([[1], [2]], names=["label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns have one name"):
        rows(tmp_path / "a.parquet")


def test_numbers_of_classes_get_their_names(tmp_path: Path) -> None:
    """As ``datasets`` writes them, single and in lists; -1 is no label."""
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    label = ClassLabel(names=["no", "yes"])
    features = Features({"text": Value("string"), "label": label, "tags": Sequence(label)})
    cells = {"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], []]}
    data = Dataset.from_dict(cells, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    assert rows(tmp_path / "a.parquet") == [
        {"text": "a", "label": "yes", "tags": ["no", "yes"]},
        {"text": "b", "label": None, "tags": []},
    ]
    data.save_to_disk(str(tmp_path / "disk"))
    for read in (rows, lambda path: hub_dataset(str(path), subset=None, split="train")):
        with pytest.raises(DataError, match=r"save_to_disk[\s\S]*to_parquet"):
            read(tmp_path / "disk")


def test_folders_follow_links_and_leave_a_readme_out(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root, elsewhere):
        folder.mkdir()
        (folder / "a.jsonl").write_text('{"text": "x"}\n')
    (root / "README.txt").write_text("about the data")
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    found = [root / "a.jsonl", root / "linked" / "a.jsonl"]
    assert table_files(root) == found == table_files(root / "**" / "*.jsonl")
    (root / "b.jsonl").symlink_to(root / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"leads nowhere[\s\S]*b.jsonl"):
        table_files(root)
