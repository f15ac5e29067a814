"""A tag for each word, and answers in a text, end to end: trained, evaluated, predicted, exported,
used by transformers alone.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hfscale.errors import ConfigError
from hfscale.jobs import export
from launch.commands.evaluate import evaluate
from launch.commands.predict import predict
from tests.helpers.cli import hfscale
from tests.helpers.labelled import BAD, GOOD, REST, THINGS, make_encoder, task_values, write_jsonl

pytestmark = pytest.mark.slow


def sentences(count: int, rng: random.Random) -> list[dict]:
    """Names of things are entities of one or two words."""
    rows = []
    for _ in range(count):
        words, tags = rng.choices(REST, k=rng.randint(2, 8)), []
        tags = ["O"] * len(words)
        for _ in range(rng.randint(0, 2)):
            entity = (
                [rng.choice(GOOD), rng.choice(THINGS)]
                if rng.random() < 0.5
                else [rng.choice(THINGS)]
            )
            words += [*entity, rng.choice(REST)]
            tags += ["B-THING", *["I-THING"] * (len(entity) - 1), "O"]
        rows.append({"words": words, "tags": tags})
    return rows


def questions(count: int, rng: random.Random) -> list[dict]:
    """What a thing was: the word after it; in one text in five there is no such word."""
    rows = []
    for _ in range(count):
        mood = "" if rng.random() < 0.2 else rng.choice(GOOD + BAD)
        context = " ".join(
            [
                *rng.choices(REST, k=rng.randint(2, 20)),
                *([mood] if mood else []),
                *rng.choices(REST, k=rng.randint(1, 20)),
            ]
        )
        rows.append(
            {
                "question": "was it",
                "context": context,
                "answers": {
                    "text": [mood] if mood else [],
                    "answer_start": [context.index(mood)] if mood else [],
                },
            }
        )
    return rows


def run_of(
    folder: Path, name: str, *, rows: list[dict], procs: int, steps: int, **options: object
) -> Path:
    """Return the run directory of a short fine-tuning."""
    make_encoder(folder / "encoder")
    write_jsonl(folder / "rows.jsonl", rows)
    values = task_values(
        folder,
        "run",
        data={"train": str(folder / "rows.jsonl"), "test": 0.2},
        task={"name": name, "options": options},
        train={"steps": steps},
        engine={"zero_stage": 2},
        metrics={"every_steps": 30},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    hfscale("finetune", folder / "run.yaml", "--procs", procs)
    return folder / "runs" / "run"


def scores_of(run: Path) -> dict[str, float]:
    evaluate(str(run))
    [file] = run.glob("evaluations/*/*/scores.json")
    return json.loads(file.read_text())["scores"]


def transformers_say(script: str, *arguments: object, home: Path) -> list:
    """Return what a process without hfscale prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=home,
        check=True,
        env={"PATH": "", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def test_entities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(
        tmp_path, "token_classification", rows=sentences(200, random.Random(1)), procs=1, steps=240
    )
    assert scores_of(run)["f1"] > 0.9
    text = "I saw the lovely film and heard a song the"
    capsys.readouterr()
    predict(str(run), text=text)
    ours = json.loads(capsys.readouterr().out)["entities"]
    assert [(entity["type"], entity["text"]) for entity in ours] == [
        ("THING", "lovely film"),
        ("THING", "song"),
    ]
    export.run(str(run), tmp_path / "export")
    theirs = transformers_say(
        """
import json, sys
from transformers import pipeline
found = pipeline("token-classification", sys.argv[1], aggregation_strategy="simple")(sys.argv[2])
print(json.dumps([[e["entity_group"], e["start"], e["end"], float(e["score"])] for e in found]))""",
        tmp_path / "export",
        text,
        home=tmp_path,
    )
    assert [entity[:3] for entity in theirs] == [
        [entity["type"], entity["start"], entity["end"]] for entity in ours
    ]
    assert [entity[3] for entity in theirs] == pytest.approx(
        [entity["score"] for entity in ours], abs=1e-4
    )


def test_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(
        tmp_path,
        "extractive_qa",
        rows=questions(240, random.Random(2)),
        procs=2,
        steps=60,
        stride=6,
    )
    scores = scores_of(run)
    assert scores["f1"] > 80 and {"no_answer_accuracy", "best_f1_threshold"} <= scores.keys()
    asked = [
        # two windows and more
        {
            "id": "a",
            "question": "was it",
            "context": "it was very the a " * 8 + "awful and I saw it",
        },
        {"id": "b", "question": "was it", "context": "I saw it and heard it"},
    ]
    write_jsonl(tmp_path / "asked.jsonl", asked)
    with pytest.raises(ConfigError, match=r"(?s)also asks for a context.*--question Q --context C"):
        predict(str(run), text="was it")
    predict(str(run), data=str(tmp_path / "asked.jsonl"), out=tmp_path / "answers.jsonl")
    ours = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert (
        ours[0]["prediction"] == asked[0]["context"][ours[0]["start"] : ours[0]["end"]] == "awful"
    )
    true = write_jsonl(
        tmp_path / "true.jsonl", [{**asked[0], "answers": "awful"}, {**asked[1], "answers": ""}]
    )
    capsys.readouterr()
    evaluate(
        "no_answer_threshold=1000",
        task=["extractive_qa"],
        data=[str(true)],
        predictions=tmp_path / "answers.jsonl",
    )
    rescored = capsys.readouterr().out
    assert (
        "has_answer_f1               100.0000" in rescored
        and "no_answer_accuracy            0.0000" in rescored
    )

    printed = export.run(str(run), tmp_path / "export")
    assert "trust_remote_code=True" in printed and "question=" in printed
    theirs = transformers_say(
        """
import json, sys
from transformers import pipeline
pipe = pipeline("question-answering", sys.argv[1], trust_remote_code=True)
rows = map(json.loads, open(sys.argv[2]))
print(json.dumps([pipe(question=row["question"], context=row["context"]) for row in rows]))""",
        tmp_path / "export",
        tmp_path / "asked.jsonl",
        home=tmp_path,
    )
    assert [(a["answer"], a["start"], a["end"]) for a in theirs] == [
        (p["prediction"], p["start"], p["end"]) for p in ours
    ]
    assert [a["score"] for a in theirs] == pytest.approx([p["score"] for p in ours], abs=1e-4)
