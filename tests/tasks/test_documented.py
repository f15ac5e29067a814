"""The scripts and rows of docs/tasks.md make data that their tasks take."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks.kit import make_task, marking_tokenizer

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text("utf-8")


def section(task: str) -> str:
    return re.search(rf"## [^\n]*`{task}`.*?(?=\n## |\Z)", TEXT, re.S)[0]


@pytest.mark.parametrize(("task", "file"), [("token_classification", "ner.jsonl"), ("extractive_qa", "qa.jsonl")])
def test_the_script_makes_data(task, file, tmp_path):
    script = re.search(r"```python\n(.*?)```", section(task), re.S)[1]
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    examples = [json.loads(line) for line in (tmp_path / "data" / file).read_text("utf-8").splitlines()]
    made = make_task(task, examples, tokenizer=marking_tokenizer("bpe"), seq_len=128)
    features = [feature for example in examples for feature in made.features(example)]
    assert len(features) >= len(examples) > 500
    if task == "extractive_qa":
        assert made.no_answer
    else:
        assert {"B-ERROR", "B-BUILTIN", "B-MODULE", "I-MODULE"} <= {*made.labels}


@pytest.mark.parametrize(("task", "script", "file"), [
    ("translation", 0, "translation.jsonl"), ("summarization", 1, "summaries.jsonl"), ("instruction", 0, "instructions.jsonl"),
    ("embedding", 0, "pairs.jsonl")])
def test_the_script_makes_texts(task, script, file, tmp_path):
    code = re.findall(r"```python\n(.*?)```", section(task), re.S)[script]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    examples = [json.loads(line) for line in (tmp_path / "data" / file).read_text("utf-8").splitlines()]
    assert len(examples) > 300
    made = make_task(task, examples[:200], tokenizer=marking_tokenizer("bpe"), seq_len=512)
    assert all(made.features({"id": str(n), **example}) for n, example in enumerate(examples[:200]))


@pytest.mark.parametrize("task", ["token_classification", "extractive_qa", "translation", "instruction", "embedding"])
def test_the_rows_that_are_shown_are_taken(task):
    rows = [json.loads(line) for line in re.findall(r"^\{.*\}$", section(task), re.M)]
    examples = [row for row in rows if "prediction" not in row]
    made = make_task(task, examples, tokenizer=marking_tokenizer("wordpiece"), seq_len=128)
    assert len(examples) >= 2 and all({"labels", "positive"} & feature.keys() for example in examples for feature in made.features(example))
