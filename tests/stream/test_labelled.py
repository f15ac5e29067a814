"""Labelled examples: every format read alike, splits that do not leak, a cache that is never wrong,
and bad input named with its place.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hfscale.config.finetune import Examples
from hfscale.errors import ConfigError, DataError
from hfscale.shards.tables import table_rows
from hfscale.stream.examples import BadExample
from hfscale.stream.labelled import LabelledData
from hfscale.stream.roles import fraction_of, read_examples
from hfscale.tasks.table import task_class

ROWS = [
    {"id": f"r{n}", "text": text, "label": label}
    for n, (text, label) in enumerate(
        [('schön, "wie" neu', "+"), ("无聊的电影", "-"), ("fine\nfilm", "+"), ("dull", "-")]
    )
]


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Roles:
    columns = {"text": "a text", "pair": "a second text", "label": "a label"}
    optional = frozenset({"pair"})
    answers = frozenset({"label"})


class EitherRoles:  # as of a tagged sentence, or a conversation
    columns = {"text": "a text", "words": "a list of words", "tags": "as many tags"}
    optional = frozenset({"text", "words"})
    answers = frozenset({"tags"})


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        with tarfile.open(path, "w") as tar:
            for row in ROWS:
                for name, text in (
                    (f"{row['id']}.json", json.dumps({"label": row["label"]})),
                    (f"{row['id']}.text", row["text"]),
                ):
                    data = text.encode()
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "tar"])
def test_every_format_gives_the_same_examples(tmp_path: Path, kind: str) -> None:
    assert [
        example for _, example in read_examples(str(write(tmp_path, kind)), Roles, columns={})
    ] == ROWS


def test_columns_and_ids(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"review": "a", "stars": 1, "extra": 2}\n{"review": "b", "stars": 5}\n')
    columns = {"text": "review", "label": "stars"}
    assert [e for _, e in read_examples(str(path), Roles, columns=columns)] == [
        {"text": "a", "label": 1, "id": "0"},
        {"text": "b", "label": 5, "id": "1"},
    ]
    assert len([*read_examples(str(path), Roles, columns={"text": "review"}, answers=False)]) == 2
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    assert [
        e["text"]
        for _, e in read_examples(str(tmp_path / "x.txt"), Roles, columns={}, answers=False)
    ] == ["one", "two"]

    nested = {"s": {"en": "a", "zh": None}, "q": {"label": 1}, "a.b": "c"}
    path.write_text(json.dumps(nested) + "\n")
    for column, cell in (("s.en", "a"), ("s.zh", None), ("a.b", "c")):
        [(_, example)] = read_examples(
            str(path), Roles, columns={"text": column, "label": "q.label"}
        )
        assert example == {"text": cell, "label": 1, "id": "0"}
    with pytest.raises(
        DataError, match=r"no column 's.de'[\s\S]*columns are s.en, s.zh, q.label, a.b"
    ):
        [*read_examples(str(path), Roles, columns={"text": "s.de"})]

    class Prompts(Roles):
        columns = {"prompt": "what goes on"}

    assert [
        e["prompt"]
        for _, e in read_examples(str(tmp_path / "x.txt"), Prompts, columns={}, answers=False)
    ] == ["one", "two"]


def test_whole_documents_of_one_line(tmp_path: Path) -> None:
    """A list of rows, and SQuAD's own file, which has its questions below their contexts."""
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    assert [
        example for _, example in read_examples(str(tmp_path / "x.json"), Roles, columns={})
    ] == ROWS
    asked = [
        {"id": "q1", "text": "who?", "label": [{"text": "I", "answer_start": 0}]},
        {"id": "q2", "text": "when?", "label": []},
    ]
    squad = {
        "version": "v2.0",
        "data": [
            {"title": "t", "paragraphs": [{"context": "I did.", "qas": asked}]},
            {"paragraphs": []},
        ],
    }
    (tmp_path / "x.json").write_text(json.dumps(squad))
    assert [row for _, row in table_rows(tmp_path / "x.json")] == [
        {"context": "I did.", **question} for question in asked
    ]
    for row in ({"data": []}, {"data": "text"}, {"data": [{"paragraphs": 3}]}):
        (tmp_path / "x.json").write_text(json.dumps(row))
        assert [row for _, row in table_rows(tmp_path / "x.json")] == [row], "a column of that name"


@pytest.mark.parametrize(
    ("content", "columns", "words"),
    [
        ('{"text": "a", "label": 1}\n{"text": "b"', {}, r"not a JSON line[\s\S]*x.jsonl:2"),
        ("\n", {}, r"no rows in it[\s\S]*x.jsonl"),
        ('{"text": "a", "label": ["\\ud83d"]}\n', {}, r"half of a character[\s\S]*x.jsonl:1"),
        ("[1]\n", {}, r"no object[\s\S]*x.jsonl:1"),
        (
            '{"txt": "a", "label": 1}\n',
            {},
            r"no column 'text'[\s\S]*x.jsonl:1[\s\S]*columns are txt, label",
        ),
        ('{"text": "a", "label": 1}\n', {"pair": "second"}, r"no column 'second'"),
        (
            '{"text": "a", "label": 1, "id": 7}\n{"text": "b", "label": 1, "id": "7"}\n',
            {},
            r"id occurs twice[\s\S]*x.jsonl:2",
        ),
    ],
)
def test_bad_rows_are_named(
    tmp_path: Path, content: str, columns: dict[str, str], words: str
) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=words):
        [*read_examples(str(tmp_path / "x.jsonl"), Roles, columns=columns)]


@pytest.mark.parametrize("answers", [True, False])
def test_a_row_without_any_of_the_columns_that_may_be_missing(
    tmp_path: Path, answers: bool
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"tokens": ["a"], "tags": ["O"]}\n')
    words = (
        r"none of the columns text, "
        r"words[\s\S]*x.jsonl:1[\s\S]*data.columns.text=[\s\S]*columns are tokens, tags"
    )
    with pytest.raises(DataError, match=words):
        [*read_examples(str(path), EitherRoles, columns={}, answers=answers)]
    assert [
        e["words"]
        for _, e in read_examples(
            str(path), EitherRoles, columns={"words": "tokens"}, answers=answers
        )
    ] == [["a"]]


def test_what_is_wrong_with_a_line_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for line, words in (
        (
            '{"text": "a" "label": 1}',
            r"',' delimiter \(character 14\)[\s\S]*x.jsonl:2[\s\S]*value: .*\"a\" \"label\"",
        ),
        ("NaN, [", r"\(character 4\)"),
        ('{"text": "a", "label"', r"\(character 22\)"),
    ):
        path.write_text(f'{{"text": "a", "label": 1}}\n{line}\n')
        with pytest.raises(DataError, match=words) as error:
            [*read_examples(str(path), Roles, columns={})]
        assert "line 1" not in str(error.value), "which line it is says the place"
    (tmp_path / "x.csv").write_text("text,label\na film, which was bad,-\n")
    with pytest.raises(DataError, match="put a cell that holds the delimiter between quotes"):
        [*read_examples(str(tmp_path / "x.csv"), Roles, columns={})]


def test_what_is_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "none.jsonl", tmp_path, "*.nothing"):
        with pytest.raises(DataError, match="no such table"):
            [*read_examples(str(name), Roles, columns={})]
    (tmp_path / "x.csv").write_text('text,label\n"a,b\nc,d\n')
    with pytest.raises(DataError, match="quotes that close"):
        [*read_examples(str(tmp_path / "x.csv"), Roles, columns={})]
    (tmp_path / "x.csv").write_text("text,label\na,b,c\n")
    with pytest.raises(DataError, match=r"more cells than the header[\s\S]*x.csv:2"):
        [*read_examples(str(tmp_path / "x.csv"), Roles, columns={})]


def features(example: dict[str, Any]) -> list[dict[str, Any]]:
    if example["text"] == "bad":
        raise BadExample("it is bad")
    return [
        {
            "input_ids": [len(example["text"])] * 3,
            "labels": example["label"],
            "truncated": len(example["text"]) > 5,
        }
    ]


def labelled(path: Path, folder: Path, **data: Any) -> LabelledData:
    return LabelledData(
        Examples(train=str(path), cache=folder / "cache", **data), Roles, about="task"
    )


@pytest.mark.parametrize(
    ("task", "question", "answers"),
    [
        ("instruction", {}, [{"messages": talk("q", answer)} for answer in ("a", "b", "c")]),
        ("instruction", {}, [{"messages": talk("q", "a")}, {"prompt": " q", "response": "b"}]),
        (
            "instruction",
            {},
            [{"messages": [{"role": "system", "content": s}, *talk("q", "a")]} for s in "xy"],
        ),
        (
            "extractive_qa",
            {"question": "q", "context": "c"},
            [{"answers": ["x"], "answer_start": 3}, {"answers": ["y"], "answer_start": 5}, {}],
        ),
        (
            "embedding",
            {"text": "q"},
            [{"positive": "a"}, {"positive": "b", "negative": "c"}, {"positive": "a", "score": 2}],
        ),
        ("sequence_classification", {"text": "q"}, [{"label": 1}, {"label": 0, "pair": None}]),
        ("token_classification", {"words": ["q"]}, [{"tags": ["O"]}, {"tags": ["B"], "text": ""}]),
        ("translation", {"source": "q"}, [{"target": "a"}, {"target": "b"}]),
    ],
)
def test_equal_questions_are_in_one_split_whatever_their_answers(
    task: str, question: dict[str, Any], answers: list[dict[str, Any]]
) -> None:
    roles = task_class(task)
    sides = {
        fraction_of({"id": str(n), **question, **answer}, roles) for n, answer in enumerate(answers)
    }
    assert len(sides) == 1
    assert fraction_of({"id": "9", "text": "other", "prompt": "other"}, roles) not in sides


def test_splits_by_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"text": f"text {n % 900}", "label": n % 2} for n in range(1000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = labelled(path, tmp_path, validation=0.2, test=0.1)
    parts = {
        split: [example["text"] for example in data.examples(split)]
        for split in ("train", "validation", "test")
    }
    assert (
        sum(map(len, parts.values())) == 1000
        and 140 < len(parts["validation"]) < 260
        and 60 < len(parts["test"]) < 140
    )
    assert not {*parts["train"]} & {*parts["validation"]} and not {*parts["test"]} & {
        *parts["train"],
        *parts["validation"],
    }
    # nobody changes sides
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert {*parts["test"]} == {example["text"] for example in data.examples("test")}
    with pytest.raises(ConfigError, match="no validation split"):
        [*labelled(path, tmp_path).examples("validation")]


def test_prepared_once_and_by_content(tmp_path: Path) -> None:
    path, calls = tmp_path / "x.jsonl", []
    path.write_text(
        "".join(
            json.dumps({"text": text, "label": 1}) + "\n" for text in ("one", "bad", "very long")
        )
    )

    def counted(example: dict[str, Any]) -> list[dict[str, Any]]:
        calls.append(example["id"])
        return features(example)

    with pytest.raises(DataError, match=r"1 examples of train cannot be used[\s\S]*1: it is bad"):
        labelled(path, tmp_path).prepared("train", counted, about="a")
    made = labelled(path, tmp_path, on_error="skip").prepared("train", counted, about="a")
    assert calls == ["0", "1", "2"], "what was made before the refusal is found again"
    assert asdict(made.report) | {"digest": ""} == {
        "digest": "",
        "examples": 2,
        "features": 2,
        "truncated": 1,
        "unlearnt": {},
        "bad": 1,
        "shown": ["1: it is bad"],
    }
    assert [row["input_ids"] for row in made.features] == [
        [3] * 3,
        [9] * 3,
    ] and made.of.tolist() == [0, 1]
    assert [example["id"] for example in made.examples()] == ["0", "2"]
    # by newer code, say
    again = labelled(path, tmp_path, on_error="skip").prepared("train", counted, about="b")
    assert len(calls) == 6 and again.fingerprint == made.fingerprint, (
        "what is trained on is the same"
    )
    refused = labelled(path, tmp_path, on_error="skip", too_long="refuse").prepared(
        "train", counted, about="a"
    )
    assert refused.fingerprint != made.fingerprint and refused.report.bad == 2
    assert "longer than data.max_length" in refused.report.shown[1]
    path.write_text(json.dumps({"text": "bad", "label": 1}) + "\n")
    with pytest.raises(DataError, match="no example of train is left"):
        labelled(path, tmp_path, on_error="skip").prepared("train", counted, about="a")
