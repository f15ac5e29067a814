"""Fine-tuning with the real engine: the same numbers for every cut, exact resumes, each validated
example counted once; and its verbs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import pipeline

from hfscale import log
from hfscale.checkpoint import layout
from hfscale.config.finetune import FinetuneConfig
from hfscale.errors import CheckpointError, ConfigError, DataError, UserError
from hfscale.jobs import export
from hfscale.jobs.asked import settle
from hfscale.jobs.predict import open_task
from hfscale.run.model import find
from hfscale.run.run import Run
from launch.commands.evaluate import evaluate
from launch.commands.predict import predict
from tests.helpers.cli import ROOT, hfscale
from tests.helpers.labelled import make_encoder, reviews, task_values, write_jsonl
from tests.helpers.ranks import run_ranks
from tests.helpers.training import check_rewind, train

pytestmark = pytest.mark.slow
NO_DROPOUT = {"config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
EXACT = (
    "loss",
    "lr",
    "grad_norm",
    "batch_digest",
    "tokens_seen",
    "validation_loss",
    "validation_accuracy",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    make_encoder(folder / "encoder")
    write_jsonl(folder / "reviews.jsonl", reviews(300))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run that has learnt its task, made by the command."""
    config = folder / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            task_values(
                folder,
                "run",
                data={"test": 0.2, "validate_every_steps": 30},
                train={"steps": 60},
                checkpoint={"keep_best": {"metric": "validation_accuracy"}},
            )
        )
    )
    said = hfscale("finetune", config, "--procs", 2).stderr
    assert (
        "start fresh: classifier.weight, classifier.bias" in said and "validation_accuracy" in said
    )
    return folder / "runs" / "run"


def records(folder: Path, name: str, ranks: int, **sections: Any) -> list[dict[str, Any]]:
    values = task_values(
        folder,
        name,
        **{"data": {"validate_every_steps": 3}, "schedule": {"name": "constant"}, **sections},
    )
    return [
        {key: record.get(key) for key in EXACT} for record in run_ranks(train, ranks, values)[0]
    ]


def test_the_cut_changes_nothing_and_a_resume_is_exact(folder: Path) -> None:
    alone = records(folder, "alone", 1, model=NO_DROPOUT, train={"micro_batch": 16})
    assert [record["validation_accuracy"] is not None for record in alone] == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    # 8 does not divide the examples that are validated: ranks are padded
    for ranks, stage in (
        (2, 1),
        (2, 3),
    ):
        cut = records(
            folder, f"cut-{ranks}-{stage}", ranks, model=NO_DROPOUT, engine={"zero_stage": stage}
        )
        for one, other in zip(alone, cut, strict=True):
            assert (
                one["batch_digest"] == other["batch_digest"]
                and one["tokens_seen"] == other["tokens_seen"]
            )
            for key in EXACT:
                assert (
                    other[key] is one[key]
                    if one[key] is None
                    else other[key] == pytest.approx(one[key], rel=1e-3)
                ), key
    whole = records(folder, "whole", 2)  # with dropout
    first = records(folder, "halves", 2, train={"steps": 3})
    assert first + records(folder, "halves", 2) == whole
    moved = run_ranks(
        train, 1, task_values(folder, "halves", train={"steps": 9}, schedule={"name": "constant"})
    )[0]
    assert [record["step"] for record in moved] == [7, 8, 9]  # on another number of ranks


def test_a_run_on_examples_goes_back_without_those_of_a_step(folder: Path) -> None:
    def values(name: str, policy: str) -> dict[str, Any]:
        return task_values(
            folder,
            name,
            data={"validate_every_steps": 3},
            model=NO_DROPOUT,
            schedule={"name": "constant"},
            train={"steps": 8},
            checkpoint={"every_steps": 2, "keep_last": 9},
            health={"policy": policy},
        )

    check_rewind(values, rows=(64, 80), exact=EXACT)
    printed = hfscale("incident", folder / "runs" / "rewound", 1).stdout
    assert "16 rows" in printed and "of data.train, id r" in printed and '"label": "' in printed


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_an_export_gives_the_same_answers(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 'pipeline("text-classification"' in export.run(str(run), folder / "exported")
    rows = reviews(40, seed=9)
    data = str(
        write_jsonl(folder / "new.jsonl", [{"id": row["id"], "text": row["text"]} for row in rows])
    )
    for number, model in enumerate((run, folder / "exported")):
        predict(str(model), data=data, out=folder / f"new-{number}.out")
    ours, exported = lines(folder / "new-0.out"), lines(folder / "new-1.out")
    theirs = pipeline("text-classification", model=str(folder / "exported"))(
        [row["text"] for row in rows]
    )
    assert [row["id"] for row in ours] == [row["id"] for row in rows]
    assert (
        [row["prediction"] for row in ours]
        == [row["prediction"] for row in exported]
        == [row["label"] for row in theirs]
    )
    assert [row["scores"][row["prediction"]] for row in ours] == pytest.approx(
        [row["score"] for row in theirs], rel=1e-5
    )
    predict(
        str(run),
        data=str(write_jsonl(folder / "long.jsonl", [{"text": "lovely film " * 40 + "dull"}])),
        out=folder / "long.out",
    )
    [cut], [asked] = lines(folder / "long.out"), lines(folder / "long.jsonl")
    [there] = pipeline("text-classification", model=str(folder / "exported"))(
        asked["text"], truncation=True
    )
    assert cut["truncated"] and cut["scores"][there["label"]] == pytest.approx(
        there["score"], rel=1e-5
    )
    right = sum(
        row["prediction"] == true["label"] for row, true in zip(ours, rows, strict=True)
    ) / len(rows)
    assert right >= 0.9, right
    capsys.readouterr()
    predict(str(run), data=data)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == ours
    predict(str(run), text="a dull film")
    assert json.loads(capsys.readouterr().out)["prediction"] == "bad"


def test_a_run_is_evaluated_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(str(run), every=True)
    said = capsys.readouterr().out
    assert "accuracy" in said and "95 % [" in said
    kept = sorted((run / "evaluations" / "sequence_classification-test").glob("*/scores.json"))
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    assert len(kept) == len(checkpoints)
    best = json.loads((checkpoints[-1] / "state.json").read_text())["best"]["step"]
    assert layout.checkpoint_of(f"{run}@best").name == f"step-{best:08}" and layout.checkpoint_of(
        f"{run}@{best}"
    ).name.endswith(str(best))
    with pytest.raises(CheckpointError, match="(?s)no such checkpoint.*it has .*best"):
        predict(f"{run}@7", text="a film")
    scores, predictions = json.loads(kept[-1].read_text()), kept[-1].with_name("predictions.jsonl")
    assert scores["examples"] == len(lines(predictions)) > 40
    before = {file: file.stat().st_mtime_ns for file in kept}
    evaluate(str(run), every=True)
    assert (
        capsys.readouterr().out == said
        and {file: file.stat().st_mtime_ns for file in kept} == before
    )
    evaluate(str(run), predictions=predictions)
    assert f"{scores['scores']['accuracy']:.4f}" in capsys.readouterr().out
    torn = predictions.with_name("torn.jsonl")
    torn.write_text(predictions.read_text()[:-20])
    with pytest.raises(DataError, match=rf"(?s)not a JSON line.*torn.jsonl:{scores['examples']}"):
        evaluate(str(run), predictions=torn)
    torn.write_text("".join(predictions.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="1 of which have none"):
        evaluate(str(run), predictions=torn)
    torn.write_text(predictions.read_text() + '{"id": "more", "prediction": "good"}')
    with pytest.raises(DataError, match="(?s)0 of which have none.*'more'"):
        evaluate(str(run), predictions=torn)
    some = lines(predictions)
    for changed, words in (
        ([*some, some[0]], "an id occurs twice"),
        ([{"id": some[0]["id"]}], "there is no prediction"),
    ):
        with pytest.raises(DataError, match=words):
            evaluate(str(run), predictions=write_jsonl(torn, changed))
    tables = [
        str(write_jsonl(torn.with_name(f"{name}.jsonl"), reviews(30, seed=3)))
        for name in ("one", "two")
    ]
    capsys.readouterr()
    evaluate(str(run), data=tables)  # several in one go
    said = capsys.readouterr().out
    assert f"{run}  {tables[0]}  30 examples" in said and said.count("accuracy") == 2
    with pytest.raises(ConfigError, match="each of several tasks wants its data"):
        evaluate(str(run), task=["sequence_classification", "fill_mask"], data=tables[:1])
    asked = write_jsonl(
        torn.with_name("asked.jsonl"),
        [{"id": "0", "question": "a?", "context": "a b", "answers": "b"}],
    )
    with pytest.raises(DataError, match="no predictions of this task"):
        evaluate(
            task=["extractive_qa"],
            data=[str(asked)],
            predictions=write_jsonl(torn, [{"id": "0", "prediction": 5}]),
        )


def test_predictions_survive_a_kill(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = str(write_jsonl(folder / "many.jsonl", reviews(6000, seed=2)))
    out, parts = folder / "many.out", folder / ".many.out.parts"
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "predict",
        str(run),
        "--data",
        rows,
        "--out",
        str(out),
        "--procs",
        "2",
    ]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while len(list(parts.glob("0*.jsonl"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not out.exists() and 2 <= len(list(parts.glob("0*.jsonl"))) < 12
    with pytest.raises(DataError, match="(?s)half-made.*other task"):
        predict(str(run), ["threshold=0.9"], data=rows, out=out)
    chunk = min(parts.glob("0*.jsonl"))
    (folder / "kept").write_bytes(chunk.read_bytes())
    chunk.write_bytes(chunk.read_bytes()[:-50])
    with pytest.raises(
        DataError, match=f"(?s)part of the predictions was changed.*{chunk.name}.*511 of 512"
    ):
        # on one process, and no chunk is moved by its batch
        predict(str(run), ["predict.batch=1000"], data=rows, out=out)
    (folder / "kept").rename(chunk)
    predict(str(run), data=rows, out=out)
    assert "6,000 predictions" in capsys.readouterr().out
    assert [line["id"] for line in lines(out)] == [
        f"r{number}" for number in range(6000)
    ] and not parts.exists()
    with pytest.raises(DataError, match="exists already"):
        predict(str(run), data=rows, out=out)
    # three chunks for two ranks that hold a half of the model each
    few = str(write_jsonl(folder / "few.jsonl", reviews(1100, seed=2)))
    split = [
        "engine.zero_stage=3",
        "engine.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    ]
    predict(str(run), split, data=few, out=folder / "few.out", procs=2)
    predict(str(run), data=few, out=folder / "plain.out")
    assert lines(folder / "few.out") == lines(folder / "plain.out")


def test_mistakes_in_what_is_asked_of_a_model(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = reviews(3, seed=4)
    table = str(write_jsonl(tmp_path / "rows.jsonl", [*rows, {**rows[0], "id": "e", "text": " "}]))
    out = tmp_path / "out.jsonl"
    log.setup()
    with pytest.raises(
        ConfigError, match=r"(?s)longer than the model can read.*data.max_length.*5000.*or less"
    ):
        # nothing was made, so nothing is in the way of what follows
        predict(str(run), ["data.max_length=5000"], data=table, out=out)
    predict(str(run), ["data.max_length=3"], data=table, out=out)
    said = capsys.readouterr().err
    assert [row.get("truncated") for row in lines(out)] == [
        True,
        True,
        True,
        None,
    ] and "3 of 4 examples were cut" in said
    assert (
        "1 of 4 examples have a problem instead of a prediction, such as e: the text is empty"
        in said
    )
    with pytest.raises(DataError, match=r"cannot write: Not a directory"):
        predict(str(run), data=table, out=out / "below-a-file")
    with pytest.raises(ConfigError, match=r"(?s)written key=value.*'runs/other'"):
        evaluate(str(run), ["runs/other"])
    with pytest.raises(DataError, match=r"(?s)1 example cannot be scored.*e: the text is empty"):
        evaluate(str(run), data=[table])
    evaluate(str(run), ["data.on_error=skip"], data=[table])
    assert "3 examples, 1 left out" in capsys.readouterr().out
    empty = str(write_jsonl(tmp_path / "empty.jsonl", [{**row, "text": ""} for row in rows]))
    with pytest.raises(
        DataError, match=r"(?s)no example can be scored.*empty.jsonl.*the text is empty"
    ):
        evaluate(str(run), ["data.on_error=skip"], data=[empty])
    with pytest.raises(ConfigError, match=r"(?s)which examples to score.*--data FILE"):
        evaluate(str(folder / "encoder"), task=["sequence_classification"])
    with pytest.raises(ConfigError, match="(?s)only predicts.*fill_mask"):
        evaluate(str(folder / "encoder"), task=["fill_mask"], data=[table])
    with pytest.raises(ConfigError, match="--question Q --context C"):
        predict(str(folder / "encoder"), task="extractive_qa", question="who?")
    parts = tmp_path / ".late.jsonl.parts"
    parts.mkdir()
    (parts / "key.json").write_text("{")
    with pytest.raises(DataError, match="(?s)half-made predictions is damaged.*key.json"):
        predict(str(run), data=table, out=tmp_path / "late.jsonl")


def test_what_does_not_fit_is_refused_before_ranks_start(folder: Path, tmp_path: Path) -> None:
    def refused(kind: type[UserError], words: str, **sections: Any) -> None:
        with pytest.raises(kind, match=words):
            Run(FinetuneConfig.model_validate(task_values(folder, "none", **sections))).check()

    refused(
        DataError,
        "(?s)no column 'review'.*the columns are id, text, label",
        data={"columns": {"text": "review"}},
    )
    refused(ConfigError, "(?s)no such role.*did you mean text", data={"columns": {"texts": "text"}})
    refused(ConfigError, "unknown task", task={"name": "sequence_clasification"})
    refused(
        ConfigError, "(?s)unknown option.*label_smoothing", task={"options": {"smoothing": 0.1}}
    )
    refused(
        ConfigError,
        "(?s)generation.num_beam: unknown option; did you mean num_beams",
        task={"name": "translation", "options": {"generation": {"num_beam": 2}}},
    )
    refused(
        ConfigError,
        "(?s)no validation gives.*validation_acuracy.*did you mean validation_accuracy",
        checkpoint={"keep_best": {"metric": "validation_acuracy"}},
    )
    refused(
        ConfigError,
        "(?s)64 positions.*data.max_length.*remedy: .*data.max_length=64.? or less",
        data={"max_length": 100},
    )
    refused(
        ConfigError,
        "(?s)bert has no AutoModelForSeq2SeqLM.*of pretraining",
        task={"name": "translation"},
        data={"columns": {"source": "text", "target": "label"}},
    )
    refused(DataError, "(?s)bad.*not in the set", task={"options": {"labels": ["good", "poor"]}})
    empty = write_jsonl(
        tmp_path / "empty.jsonl", [*reviews(20), {"id": "x", "text": " ", "label": "bad"}]
    )
    refused(
        DataError,
        "(?s)1 examples of train cannot be used.*x: the text is empty",
        data={"train": str(empty), "validation": None},
    )
    torn = tmp_path / "torn.jsonl"
    torn.write_text(write_jsonl(tmp_path / "good.jsonl", reviews(20)).read_text()[:-10])
    refused(
        DataError,
        r"(?s)not a JSON line.*torn.jsonl:20",
        data={"train": str(torn), "validation": None},
    )
    with pytest.raises(CheckpointError, match="no head for the task"):
        open_task(
            settle(
                find(folder / "encoder"),
                task="sequence_classification",
                data="-",
                out=tmp_path / "x",
                overrides=[],
            )
        )


def test_the_verb_shows_and_tries(folder: Path) -> None:
    config = folder / "dry.yaml"
    config.write_text(yaml.safe_dump(task_values(folder, "dry")))
    assert "sequence_classification" in hfscale("show", config).stdout
    assert "global_batch 16" in hfscale("finetune", config, "--dry-run").stdout
    assert not (folder / "runs" / "dry").exists()
    assert (
        hfscale("finetune", config, "--launcher", "debug").returncode == 0
        and (folder / "runs" / "dry-debug" / "metrics.jsonl").exists()
    )
