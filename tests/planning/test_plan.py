"""`hfscale plan`: it fits or not, what it recommends, and what it refuses. Data and tokenizer of
these configs are nowhere.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.config.finetune import FinetuneConfig
from hfscale.config.load import load_config
from hfscale.config.schema import RunConfig
from hfscale.errors import ConfigError
from hfscale.planning.figures import GIB
from hfscale.planning.plan import Plan, make_plan
from hfscale.planning.site import Asked
from launch.commands.plan import plan as plan_verb

ROOT = Path(__file__).resolve().parents[2]
LLAMA_1B = ROOT / "configs" / "pretrain" / "llama_1b.yaml"
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
H100 = Asked(gpu="h100", gpus=8)


def config_of(**changed: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run": {"name": "planned"},
        "tokenizer": {"path": "./nowhere"},
        "data": {"seq_len": 256, "sources": [{"shards": "./nowhere-either"}]},
        "objective": {"name": "clm"},
        "model": {
            "architecture": "llama",
            "config": {
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "vocab_size": 1000,
                "max_position_embeddings": 512,
            },
        },
        "train": {"steps": 100, "global_batch": 64, "micro_batch": 4},
    }
    for key, value in changed.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return RunConfig.model_validate(values)


def peak(plan: Plan) -> float:
    section = next(one for one in plan.sections if one.title.startswith("memory a rank"))
    return section.figures[0].value


def test_a_70b_is_planned_in_seconds_and_without_its_memory():
    config = config_of(model__config=LLAMA_70B, data__seq_len=8192, train__global_batch=512)
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = make_plan(config, Asked(gpu="h100", gpus=512))
    assert time.process_time() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert plan.figure("model", "parameters").value == 70_553_706_496  # as Meta counts them
    fitting = [row for row in plan.stages if row.fits]
    assert fitting and fitting[0].stage == 3


def test_each_figure_says_how_it_comes_about():
    plan = make_plan(config_of(), H100)
    figures = [one for section in plan.sections for one in section.figures]
    assert all(one.how for one in figures)
    text = plan.text(explain=True)
    assert all(one.how in text for one in figures)
    assert json.loads(plan.to_json())["fits"] is True


def test_what_is_recommended_fits_as_a_config():
    """A 1B in fp32 without checkpointing, rows of 2,048, on one small GPU: no; as advised: yes."""
    asked = Asked(gpu="rtx4090", gpus=2)
    config = load_config(LLAMA_1B, ["train.micro_batch=32"]).config
    plan = make_plan(config, asked)
    assert not plan.fits and peak(plan) > 23.6 * GIB
    lines = [line for line in plan.advice if line.startswith("  ")]
    said = yaml.safe_load("\n".join(lines))
    overrides = [
        f"{section}.{key}={json.dumps(value)}"
        for section in said
        for key, value in said[section].items()
    ]
    advised = make_plan(load_config(LLAMA_1B, overrides).config, asked)
    assert advised.fits
    assert "as good as any" in advised.advice[0]


def test_what_is_missing_is_assumed_and_said():
    plan = make_plan(config_of(), H100)
    assert any("no tokenizer" in line for line in plan.assumed)
    config = config_of(train__steps=None, train__epochs=1)
    plan = make_plan(config, H100)
    assert any("length of the run is not known" in line for line in plan.assumed)
    assert [one.title for one in plan.sections][-1] == "the run"


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [({"name": "lion"}, 4), ({"name": "sgd"}, 4), ({"name": "sgd", "momentum": 0.0}, 0)],
)
def test_what_an_optimizer_keeps_is_planned(optimizer: dict[str, Any], kept: int):
    values = config_of().model_dump(mode="json", by_alias=True) | {"optim": optimizer}
    plan = make_plan(RunConfig.model_validate(values), H100)
    trained = plan.figure("model", "trained").value
    shares = plan.figure("the run", "a checkpoint").value
    assert shares == pytest.approx((4 + kept) * trained)


def test_muon_keeps_less_and_what_is_not_planned_is_said():
    values = config_of().model_dump(mode="json", by_alias=True) | {"optim": {"name": "muon"}}
    plan = make_plan(RunConfig.model_validate(values), H100)
    trained = plan.figure("model", "trained").value
    assert 8 * trained < plan.figure("the run", "a checkpoint").value < 12 * trained
    assert any("muon" in line for line in plan.assumed)


def test_nothing_fits_and_that_is_said():
    plan = make_plan(config_of(model__config=LLAMA_70B), Asked(gpu="t4", gpus=1, memory_gib=2))
    assert not plan.fits and not any(row.fits for row in plan.stages)
    assert "nothing fits" in plan.advice[0]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(gpu="h1000", gpus=1), "h100"),
        (Asked(gpu="a100", gpus=1), "a100-40 or a100-80"),
        (Asked(gpu="rtx4090", gpus=16), "--network"),
        (Asked(gpu="h100", gpus=9, nodes=2), "--gpus 8"),
    ],
)
def test_a_place_that_is_not_known_is_refused(asked: Asked, words: str):
    with pytest.raises(ConfigError, match=words):
        make_plan(config_of(), asked)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model__architecture": "lama"}, "llama"),
        ({"model__config": {"num_attention_heads": 0}}, "llama"),
        ({"model__config": {"hiden_size": 8}}, "hidden_size"),
        (
            {"engine__precision": "fp32", "engine__zero_stage": 0, "engine__offload": "optimizer"},
            "offload",
        ),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(changed: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        make_plan(config_of(**changed), H100)


def test_every_objective_is_planned_without_its_tokenizer():
    for name, architecture in (("mlm", "bert"), ("seq2seq", "t5")):
        config = config_of(objective__name=name, model__architecture=architecture, model__config={})
        assert peak(make_plan(config, H100)) > GIB


@pytest.mark.parametrize("task", ["sequence_classification", "extractive_qa"])
def test_adapters_beside_a_pretrained_model_are_planned(tmp_path: Path, task: str):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=300, intermediate_size=128, **sizes)).save_pretrained(tmp_path)
    values = {
        "run": {"name": "tuned"},
        "data": {"train": "./no-table.csv"},
        "model": {"pretrained": str(tmp_path), "lora": {"r": 4}},
        "task": {"name": task},
        "train": {"epochs": 1, "global_batch": 16, "micro_batch": 8},
    }
    plan = make_plan(FinetuneConfig.model_validate(values), H100)
    whole, trained = (plan.figure("model", name).value for name in ("parameters", "trained"))
    assert 0 < trained < whole / 4
    assert plan.figure("model", "  adapters").value > 0
    assert any("max_length" in line for line in plan.assumed)


def test_logits_that_are_never_there_together_are_not_planned_for():
    sizes = config_of().model.config | {"vocab_size": 128256, "max_position_embeddings": 2048}
    peaks = {}
    for head in ("plain", "chunked", "auto"):
        config = config_of(
            model__config=sizes,
            data__seq_len=2048,
            engine__head=head,
            engine__activation_checkpointing=True,
        )
        peaks[head] = peak(make_plan(config, Asked(gpu="h100", gpus=1)))
    assert peaks["auto"] == peaks["chunked"]
    logits = 2 * 4 * 2048 * 128256
    weight = 4 * 256 * 128256
    assert peaks["plain"] - peaks["chunked"] > 2 * logits - 4 * weight - 0.5 * GIB


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]):
    plan_verb(str(LLAMA_1B), gpu="h100", gpus=8)
    text = capsys.readouterr().out
    assert "llama-1b on 8 x H100 SXM" in text and "the best at each ZeRO stage" in text
