"""The scripts and rows of docs/tasks/ make data that their tasks take."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks.kit import make_task, marking_tokenizer

PAGES = Path(__file__).resolve().parents[2] / "docs" / "tasks"


def page(task: str) -> str:
    return (PAGES / f"{task}.md").read_text("utf-8")


def run_script(task: str, folder: Path) -> None:
    """Make the data of a page in ``folder``: its first script does."""
    script = re.search(r"```python\n(.*?)```", page(task), re.S)[1]
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)


@pytest.mark.parametrize(
    ("task", "file"), [("token_classification", "ner.jsonl"), ("extractive_qa", "qa.jsonl")]
)
def test_the_script_makes_data(task, file, tmp_path):
    run_script(task, tmp_path)
    examples = [
        json.loads(line) for line in (tmp_path / "data" / file).read_text("utf-8").splitlines()
    ]
    made = make_task(task, examples, tokenizer=marking_tokenizer("bpe"), seq_len=128)
    features = [feature for example in examples for feature in made.features(example)]
    assert len(features) >= len(examples) > 500
    if task == "extractive_qa":
        assert made.no_answer
    else:
        assert {"B-ERROR", "B-BUILTIN", "B-MODULE", "I-MODULE"} <= {*made.labels}


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("sequence_classification", "sentiment/train.jsonl"),
        ("translation", "translation.jsonl"),
        ("summarization", "summaries.jsonl"),
        ("instruction", "instructions.jsonl"),
        ("embedding", "pairs.jsonl"),
    ],
)
def test_the_script_makes_texts(task, file, tmp_path):
    run_script(task, tmp_path)
    examples = [
        json.loads(line) for line in (tmp_path / "data" / file).read_text("utf-8").splitlines()
    ]
    assert len(examples) > 300
    made = make_task(task, examples[:200], tokenizer=marking_tokenizer("bpe"), seq_len=512)
    assert all(made.features({"id": str(n), **example}) for n, example in enumerate(examples[:200]))


def test_the_script_of_inference_makes_what_its_commands_read(tmp_path):
    run_script("inference", tmp_path)
    named = {*re.findall(r"--data (\S+)", page("inference"))}
    assert len(named) > 1 and all((tmp_path / name).stat().st_size > 0 for name in named)


@pytest.mark.parametrize(
    "task",
    [
        "sequence_classification",
        "token_classification",
        "extractive_qa",
        "translation",
        "summarization",
        "instruction",
        "embedding",
    ],
)
def test_the_rows_that_are_shown_are_taken(task):
    rows = [json.loads(line) for line in re.findall(r"^\{.*\}$", page(task), re.M)]
    examples = [row for row in rows if "prediction" not in row]
    if task == "sequence_classification":  # three problems
        made = [
            make_task(
                task,
                [row, {**row, "id": "other", "label": other}],
                tokenizer=marking_tokenizer("wordpiece"),
                seq_len=128,
            )
            for row, other in zip(examples, ("bad", "yes", ["sport"]), strict=True)
        ]
        assert [task.problem for task in made] == ["single_label_classification"] * 2 + [
            "multi_label_classification"
        ]
        assert all(
            "labels" in task.features(row)[0] for task, row in zip(made, examples, strict=True)
        )
        return
    made = make_task(task, examples, tokenizer=marking_tokenizer("wordpiece"), seq_len=128)
    assert len(examples) >= 2 and all(
        {"labels", "positive"} & feature.keys()
        for example in examples
        for feature in made.features(example)
    )
