"""Contradictions between sections, batch arithmetic, and what a resume may change."""

from __future__ import annotations

from typing import Any

import pytest

from hfscale.config.rules import (
    Difference,
    notices,
    problems,
    resume_differences,
    solve_batch,
    total_steps,
)
from hfscale.config.schema import Best, RunConfig, Train
from hfscale.errors import ConfigError

VALUES: dict[str, Any] = {
    "run": {"name": "x"},
    "tokenizer": {"path": "gpt2"},
    "data": {"seq_len": 32, "sources": [{"shards": "/data/train"}]},
    "model": {"architecture": "gpt2", "config": {"n_layer": 2}},
    "objective": {"name": "clm"},
    "train": {"steps": 10, "global_batch": 8, "micro_batch": 2},
}


def config(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        VALUES | {name: VALUES.get(name, {}) | section for name, section in sections.items()}
    )


@pytest.mark.parametrize(
    ("best", "mode"),
    [
        ({}, "min"),
        ({"metric": "validation_mse"}, "min"),
        ({"metric": "validation_accuracy"}, "max"),
        ({"metric": "validation_f1", "mode": "min"}, "min"),
    ],
)
def test_the_best_is_the_least_loss_or_the_highest_score(best: dict[str, Any], mode: str):
    """Nobody who names a score and no mode wants its worst checkpoint; what the config says is written out for a resume."""
    made = Best(**best)
    assert made.mode == mode == Best(**made.model_dump()).mode


@pytest.mark.parametrize(
    ("sections", "key", "words"),
    [
        ({"train": {"steps": None}}, "train.steps", "none of them"),
        ({"train": {"epochs": 2}}, "train.epochs", "train.steps=null"),
        ({"train": {"micro_batch": 3}}, "train.micro_batch", "2 or 4"),
        ({"model": {"pretrained": "gpt2"}}, "model.architecture", "exactly one"),
        ({"model": {"architecture": None}}, "model.architecture", "exactly one"),
        (
            {"engine": {"extra": {"communication_data_type": "bf16"}}},
            "engine.extra.communication_data_type",
            "fewer bits",
        ),
        (
            {"engine": {"extra": {"scheduler": {"type": "WarmupLR"}}}},
            "engine.extra.scheduler",
            "`schedule` sets",
        ),
        (
            {
                "data": {"validation": {"shards": "/v", "every_steps": 1}},
                "checkpoint": {"keep_best": {"mode": "max"}},
            },
            "checkpoint.keep_best.mode",
            "worst",
        ),
        (
            {"data": {"sources": [{"shards": "/a"}, {"shards": "/b"}]}},
            "data.sources.1.name",
            "two sources are named text",
        ),
        ({"data": {"sources": [{"shards": "/a", "weight": 0}]}}, "data.sources", "sum to nothing"),
        (
            {"data": {"stages": [{"at": 0.5, "weights": {"txet": 1}}]}},
            "data.stages.0.weights",
            "no source txet; did you mean text",
        ),
        (
            {"data": {"stages": [{"at": 5, "weights": {"text": 0}}]}},
            "data.stages.0.weights",
            "all weights are 0",
        ),
    ],
)
def test_contradictions(sections: dict[str, Any], key: str, words: str):
    [(found, message)] = problems(config(**sections))
    assert found == key
    assert words in message


def test_a_sound_config_has_no_problems_and_no_notices():
    assert problems(config()) == []
    assert notices(config()) == []


def test_notices():
    said = " ".join(
        notices(
            config(schedule={"warmup_steps": 10}, engine={"zero_stage": 0, "precision": "bf16"})
        )
    )
    assert "never gets to optim.lr" in said
    assert "runs as stage 1" in said


def test_batch_equation():
    plan = solve_batch(512, micro_batch=8, world_size=16)
    assert plan.equation == "global_batch 512 = micro_batch 8 x accumulation 4 x world_size 16"


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "offers"),
    [
        (500, 8, 16, ("train.global_batch=384 or 512",)),
        (
            96,
            16,
            4,
            ("train.global_batch=64 or 128", "train.micro_batch=12 or 24", "world_size 3 or 6"),
        ),
        (4, 8, 1, ("train.global_batch=8", "train.micro_batch=4")),
        (1, 1, 2, ("train.global_batch=2", "world_size 1")),
    ],
)
def test_a_batch_that_does_not_divide_offers_values_that_do(
    global_batch: int, micro_batch: int, world_size: int, offers: tuple[str, ...]
):
    with pytest.raises(ConfigError) as caught:
        solve_batch(global_batch, micro_batch=micro_batch, world_size=world_size)
    for offer in offers:
        assert offer in str(caught.value)


def test_length_of_a_run():
    def steps(**length: float) -> int:
        return total_steps(
            Train(**{"global_batch": 8, "micro_batch": 2} | length), rows=100, seq_len=32
        )  # type: ignore[arg-type]

    assert steps(steps=7) == 7
    assert steps(epochs=2) == 25
    assert steps(epochs=1) == 13, "the step that straddles the end counts"
    assert steps(tokens=8 * 32 * 5) == 5
    assert steps(tokens=1) == 1
    assert steps(epochs=0.08) == 1


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("run", {"seed": 18}),
        ("tokenizer", {"path": "bert-base-cased"}),
        ("model", {"config": {"n_layer": 3}}),
        ("model", {"architecture": "llama"}),
        ("objective", {"name": "mlm"}),
        ("data", {"seq_len": 64}),
        ("data", {"lanes": 64}),
        ("data", {"block": 8}),
    ],
)
def test_a_resume_is_refused(section: str, change: dict[str, Any]):
    refused, noticed = resume_differences(config(), config(**{section: change}))
    assert len(refused) == 1
    assert noticed == []
    assert refused[0].key.startswith(f"{section}.")


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("train", {"steps": 20}),
        ("train", {"global_batch": 16}),
        ("optim", {"lr": 1e-3}),
        ("schedule", {"name": "linear"}),
        ("data", {"sources": [{"shards": "/data/train", "weight": 2.0}]}),
        ("data", {"stages": [{"at": 5, "weights": {"text": 2.0}}]}),
        ("data", {"sources": [{"shards": "/data/train"}, {"shards": "/more", "name": "more"}]}),
    ],
)
def test_a_resume_is_accepted_with_a_notice(section: str, change: dict[str, Any]):
    refused, noticed = resume_differences(config(), config(**{section: change}))
    assert (refused, len(noticed)) == ([], 1)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("train", {"micro_batch": 4}),
        ("engine", {"zero_stage": 3}),
        ("checkpoint", {"every_steps": 5}),
        ("metrics", {"every_steps": 1}),
        ("cluster", {"nodes": 4}),
        ("model", {"attention": "eager"}),
        ("run", {"root": "/elsewhere"}),
        ("data", {"prefetch_steps": 4}),
    ],
)
def test_a_resume_is_free(section: str, change: dict[str, Any]):
    assert resume_differences(config(), config(**{section: change})) == ([], [])


def test_a_difference_shows_both_values():
    [difference], _ = resume_differences(config(), config(run={"seed": 18}))
    assert difference == Difference("run.seed", 17, 18)
    assert str(difference) == "run.seed: 17 -> 18"
