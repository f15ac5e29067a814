"""Contradictions between sections, batch arithmetic, and what a resume may change."""

from __future__ import annotations

from typing import Any

import pytest

from hfscale.config.rules import (
    Difference,
    Length,
    notices,
    problems,
    resume_differences,
    run_length,
    solve_batch,
)
from hfscale.config.schema import Best, RunConfig, Train
from hfscale.config.unsafe import unsafe
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
    """Nobody who names a score and no mode wants its worst checkpoint; what the config says is
    written out for a resume.
    """
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
            {"engine": {"extra": {"zero_optimization": {"overlap_comm": True}}}},
            "engine.extra.zero_optimization.overlap_comm",
            "nothing to overlap",
        ),
        (
            {"engine": {"zero_stage": 3, "extra": {"compile": {"deepcompile": True}}}},
            "engine.extra.compile",
            "DeepCompile",
        ),
        (
            {"engine": {"extra": {"zero_optimization": {"compute_grad_norm": False}}}},
            "engine.extra.zero_optimization.compute_grad_norm",
            "what clips",
        ),
        ({"optim": {"name": "sgd", "eps": 1e-8}}, "optim.eps", "adamw, muon have"),
        ({"optim": {"momentum": 0.9}}, "optim.momentum", "adamw has no momentum"),
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
    plan = solve_batch(512, micro_batch=8, data_size=16)
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
        solve_batch(global_batch, micro_batch=micro_batch, data_size=world_size)
    for offer in offers:
        assert offer in str(caught.value)


def length(*, step: int = 0, consumed_rows: int = 0, **train: float) -> Length:
    section = Train(**{"global_batch": 8, "micro_batch": 2} | train)  # type: ignore[arg-type]
    return run_length(section, rows=100, seq_len=32, step=step, consumed_rows=consumed_rows)


def test_length_of_a_run():
    assert length(steps=7).steps == 7
    assert length(epochs=2).steps == 25
    assert length(epochs=1).steps == 13, "the step that straddles the end counts"
    assert length(tokens=8 * 32 * 5).steps == 5
    assert length(tokens=1).steps == 1
    assert length(epochs=0.08).steps == 1


def test_a_run_that_goes_on_with_another_batch_ends_where_it_was_to_end():
    """What is done counts: 6,400 tokens are 200 rows, of which 64 were read in 8 steps of 8."""
    again = length(tokens=6400, step=8, consumed_rows=64)
    assert again == length(tokens=6400) == Length(25)
    wider = length(tokens=6400, step=8, consumed_rows=64, global_batch=16)
    assert wider == Length(8 + 9, shift=-4)  # 136 rows are left
    assert length(epochs=2, step=8, consumed_rows=64, global_batch=4) == Length(8 + 34, shift=8)
    assert length(epochs=0.5, step=8, consumed_rows=64) == Length(8), "nothing is left"
    assert length(steps=20, step=8, consumed_rows=64, global_batch=16) == Length(20)


def test_a_warmup_longer_than_the_run_is_said_however_its_length_is_given():
    def said(train: dict[str, Any], **known: Any) -> str:
        warm = config(train=train, schedule={"warmup_steps": 20})
        return " ".join(notices(warm, **known))

    batch = {"global_batch": 8, "micro_batch": 2, "steps": None}
    assert "not below the 5 steps of train.steps=5" in said({**batch, "steps": 5})
    tokens = 5 * 8 * config().data.seq_len
    assert f"not below the 5 steps of train.tokens={tokens}" in said({**batch, "tokens": tokens})
    epochs = {**batch, "epochs": 1.0}
    assert said(epochs) == "", "how many steps that is, only the data say"
    assert "not below the 13 steps of train.epochs=1.0" in said(epochs, length=Length(13))
    assert "warmup" not in said({**batch, "steps": 21})


def test_many_passes_over_little_text_are_said():
    def said(steps: int) -> str:
        train = {"global_batch": 8, "micro_batch": 2, "steps": steps}
        return " ".join(notices(config(train=train), rows=100, length=Length(steps)))

    assert said(50) == ""
    assert "80.0 times over the same 100 rows" in said(1000)


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


def test_what_is_switched_off_or_right_at_its_stage_may_be_said():
    zero = {"overlap_comm": True, "round_robin_gradients": True, "zero_quantized_weights": False}
    assert [*unsafe({"zero_optimization": zero}, stage=3)] == []
    [(key, why)] = unsafe({"zero_optimization": zero}, stage=2)
    assert key.endswith("round_robin_gradients") and "checkpoints" in why
