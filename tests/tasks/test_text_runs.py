"""A fine-tuning that generates while it validates, on two ranks at ZeRO 3; run, export and
transformers' pipeline answer alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config, T5ForConditionalGeneration, pipeline

from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World
from hfscale.jobs import export, predict
from hfscale.jobs.asked import settle
from hfscale.run.model import find
from launch.commands.predict import predict as predict_command
from tests.helpers.labelled import task_values, write_jsonl
from tests.helpers.ranks import run_ranks
from tests.tasks.test_text_generation import tokenizer, toy

pytestmark = pytest.mark.slow


def finetune(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a short run; on ranks other than 0, nothing."""
    import torch

    from hfscale.config.finetune import FinetuneConfig
    from hfscale.run.run import Run

    torch.set_num_threads(1)
    config = FinetuneConfig.model_validate(values)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Run(config, World.from_environment()).live(torch.device("cpu"))
    trainer.run()
    trainer.close()
    log = config.run_dir / "metrics.jsonl"
    return (
        [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        if World.from_environment().all.rank == 0
        else []
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of translation; its config lies in its directory, as a launcher leaves it."""
    folder = tmp_path_factory.mktemp("texts")
    words = tokenizer()
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(words),
            d_model=32,
            num_layers=2,
            num_heads=2,
            d_ff=48,
            d_kv=16,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            initializer_factor=0.3,
        )
    ).save_pretrained(folder / "t5")
    file = folder / "t5" / "generation_config.json"  # also what transformers itself would not save
    own = {"length_penalty": 1.5, "temperature": 0.9, "eos_token_id": [2, 1]}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    words.save_pretrained(folder / "t5")
    values = task_values(
        folder,
        "translation",
        model={"pretrained": str(folder / "t5")},
        data={
            "train": str(write_jsonl(folder / "pairs.jsonl", toy(60))),
            "max_length": 16,
            "validate_every_steps": 25,
        },
        task={
            "name": "translation",
            "options": {
                "prefix": "translate: ",
                "max_target_length": 5,
                "label_smoothing": 0.1,
                "generation": {"num_beams": 2},
            },
        },
        train={"steps": 25, "global_batch": 32, "micro_batch": 16},
        optim={"lr": 2e-2},
        engine={
            "zero_stage": 3,
            "extra": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        },
    )
    records, _ = run_ranks(finetune, 2, values)
    run_dir = folder / "runs" / "translation"
    (run_dir / "config.yaml").write_text(json.dumps(values), "utf-8")
    assert records[-1]["loss"] < records[0]["loss"] and records[-1]["validation_chrf"] >= 0
    return run_dir


def test_run_export_and_pipeline_answer_alike(run: Path, tmp_path: Path) -> None:
    export.run(str(run), tmp_path / "export")
    for folder in (tmp_path / "export", sorted((run / "checkpoints").glob("step-*"))[-1]):
        own = json.loads((folder / "generation_config.json").read_text())
        assert (own["length_penalty"], own["temperature"]) == (1.5, 0.9), "of the pretrained model"
        assert sorted(own["eos_token_id"]) == [1, 2]
    asked = toy(30, seed=1)
    data = write_jsonl(
        tmp_path / "asked.jsonl", [{"id": e["id"], "source": e["source"]} for e in asked]
    )
    answers = {}
    # the export says what task it is for, and how
    for name, model in (
        ("run", run),
        ("export", tmp_path / "export"),
    ):
        config = settle(
            find(model),
            task=None,
            data=str(data),
            out=tmp_path / f"{name}.jsonl",
            overrides=["predict.batch=7"],
        )
        predict.prepare(config)
        assert predict.run(config, World(), StopRequest())
        answers[name] = [
            json.loads(line)["prediction"]
            for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()
        ]
    translate = pipeline("translation", str(tmp_path / "export"), trust_remote_code=True)
    assert (
        answers["run"]
        == answers["export"]
        == [answer["translation_text"] for answer in translate([e["source"] for e in asked])]
    )
    assert len(set(answers["run"])) > 1
    split = [
        "engine.zero_stage=3",
        "engine.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}",
        "predict.batch=7",
    ]
    # two ranks hold a half each; the second has no prompts of its own
    for model in (
        run,
        tmp_path / "export",
    ):
        out = tmp_path / f"split-{model.name}.jsonl"
        predict_command(str(model), split, data=str(data), out=out, procs=2)
        assert [
            json.loads(line)["prediction"] for line in out.read_text("utf-8").splitlines()
        ] == answers["run"]
