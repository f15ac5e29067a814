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
    return re.search(rf"## `{task}`.*?(?=\n## |\Z)", TEXT, re.S)[0]


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


@pytest.mark.parametrize("task", ["token_classification", "extractive_qa"])
def test_the_rows_that_are_shown_are_taken(task):
    rows = [json.loads(line) for line in re.findall(r"^\{.*\}$", section(task), re.M)]
    examples = [row for row in rows if "prediction" not in row]
    made = make_task(task, examples, tokenizer=marking_tokenizer("wordpiece"))
    assert len(examples) >= 2 and all("labels" in feature for example in examples for feature in made.features(example))
