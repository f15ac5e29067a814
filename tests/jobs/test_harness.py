"""lm-evaluation-harness on local tasks: a run of adapters beside a run, both partitioned while they
were trained, against sums by hand.
"""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.errors import ConfigError, DataError
from hfscale.jobs import export
from hfscale.run.model import RunModel, find
from launch.commands.evaluate import evaluate
from tests.helpers.corpus import GPT2, run_values
from tests.helpers.labelled import make_encoder, write_jsonl
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow
CHOICES = [
    ("import", [" os", " the json"], 0),
    ("def", [" f", " class"], 1),
    ("return", [" None", " self.x"], 0),
]

TEXT = "import os\n" * 4


def make_run(corpus: Path, folder: Path, name: str, **sections: Any) -> Path:
    values = run_values(corpus, folder, name, **sections)
    config = RunConfig.model_validate(values)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    run_ranks(train, 2, values)
    return config.run_dir


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters on GPT-2's transposed matrices, beside a pretrained run."""
    folder = tmp_path_factory.mktemp("harness")
    base = make_run(
        corpus, folder, "base", model=GPT2, engine={"zero_stage": 3, "precision": "fp32"}
    )
    return make_run(
        corpus,
        folder,
        "beside",
        optim={"lr": 1e-2},
        model={"architecture": None, "config": {}, "pretrained": str(base), "lora": {"alpha": 64}},
        engine={"zero_stage": 2, "precision": "fp32"},
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(
        folder / "choices.jsonl", [{"q": q, "choices": c, "answer": a} for q, c, a in CHOICES]
    )
    write_jsonl(folder / "texts.jsonl", [{"text": TEXT}])
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    made: dict[str, dict[str, Any]] = {
        "my_choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "my_texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "my_words": {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "x",
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        },
    }
    for name, more in made.items():
        data = {
            "dataset_kwargs": {
                "data_files": {
                    "test": str(folder / ("texts.jsonl" if name == "my_texts" else "choices.jsonl"))
                }
            }
        }
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, **common, **data, **more})
        )
    return folder


def test_merged_adapters_give_the_engines_logits(run: Path, tmp_path: Path) -> None:
    """Exports are published only if these are equal."""
    export.run(str(run), tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    export.run(str(run), tmp_path / "alone", adapter=True)
    assert (tmp_path / "alone" / "adapter_model.safetensors").is_file()


def test_scores_are_those_computed_by_hand(
    run: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    evaluate(str(run), harness="my_choices,my_texts,my_words", harness_path=tasks)
    (kept,) = run.glob("evaluations/harness-*/*/scores.json")
    scores = json.loads(kept.read_text())["scores"]
    split = [
        "engine.zero_stage=3",
        "engine.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}",
        "harness.batch=2",
    ]
    # three questions on two ranks
    evaluate(str(run), split, harness="my_choices,my_texts,my_words", harness_path=tasks, procs=2)
    assert json.loads(kept.read_text())["scores"] == pytest.approx(scores, rel=1e-6)
    opened = find(run)
    assert isinstance(opened, RunModel)
    model, tokenizer = opened.engine(), opened.tokenizer

    def likelihood(context: str, text: str) -> float:
        before, whole = tokenizer(context)["input_ids"], tokenizer(context + text)["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(logs[at - 1, whole[at]].item() for at in range(len(before), len(whole)))

    right = [
        max(range(2), key=lambda number: likelihood(q, choices[number])) == answer
        for q, choices, answer in CHOICES
    ]
    assert scores["my_choices/acc"] == pytest.approx(sum(right) / 3)
    assert scores["my_texts/bits_per_byte"] == pytest.approx(
        -likelihood(tokenizer.eos_token, TEXT) / log(2) / len(TEXT), rel=1e-4
    )
    assert scores["my_words/exact_match"] == 0


def test_what_the_harness_cannot_ask(run: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no such task.*my_choices"):
        evaluate(str(run), harness="my_choice", harness_path=tasks)
    (lost := tmp_path / "lost").mkdir()
    (lost / "lost.yaml").write_text(
        (tasks / "my_texts.yaml")
        .read_text()
        .replace("my_texts", "lost")
        .replace("texts.jsonl", "none.jsonl")
    )
    with pytest.raises(DataError, match=r"(?s)data of a task cannot be read.*lost"):
        evaluate(str(run), harness="lost", harness_path=lost)
    with pytest.raises(ConfigError, match="likelihoods"):
        evaluate(str(make_encoder(tmp_path / "encoder")), harness="my_choices", harness_path=tasks)
