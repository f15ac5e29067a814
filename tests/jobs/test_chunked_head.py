"""Runs whose losses are made in chunks are those with all logits: at every stage, with the real
engine on two ranks; and a head that would give something else is found before the first step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfscale.config.rules import problems
from hfscale.config.schema import RunConfig
from hfscale.errors import ConfigError
from tests.helpers.corpus import LLAMA
from tests.helpers.labelled import task_values, write_jsonl
from tests.helpers.pretraining import pretraining
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train
from tests.tasks.test_text_generation import tokenizer, toy

pytestmark = pytest.mark.slow
Records = list[dict[str, Any]]
EXTRA = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # else all stay whole
GEMMA2 = {**LLAMA["config"], "head_dim": 8, "final_logit_softcapping": 2.0}


def both_ways(values: dict[str, Any], head: str = "chunked") -> tuple[Records, Records, int]:
    """Return the records of a run with all logits and of the same in chunks, and how often the
    latter asked the head; for ``run_ranks``.
    """
    from hfscale.objectives import chunked_head, cross_entropy

    asked, usual = list[int](), chunked_head._pass
    before = chunked_head.CHUNK_BYTES, cross_entropy.CPU_CHUNK, chunked_head.LARGE

    def counted(*args: Any) -> Any:
        asked.append(1)
        return usual(*args)

    runs = list[Records]()
    chunked_head._pass = counted
    chunked_head.CHUNK_BYTES, cross_entropy.CPU_CHUNK, chunked_head.LARGE = 80_000, 3_000, 1
    try:
        for way in ("plain", head):
            name = f"{values['run']['name']}-{way}"
            own = {"run": values["run"] | {"name": name}}
            own["engine"] = values["engine"] | {"head": way}
            assert not asked, "all logits"
            runs.append(train(values | own))
    finally:
        chunked_head._pass = usual
        chunked_head.CHUNK_BYTES, cross_entropy.CPU_CHUNK, chunked_head.LARGE = before
    return runs[0], runs[1], len(asked)


def check_alike(values: dict[str, Any], *, bound: float, head: str = "chunked") -> Records:
    """Check that both ways give the same; return the records of the second."""
    plain, chunked, asked = run_ranks(both_ways, 2, values, head)[0]
    assert asked > 2 * len(plain), "a proof, steps of several micro-batches"
    first = ("loss", "masked_accuracy", "validation_loss", "validation_masked_accuracy")
    for one, other in zip(plain, chunked, strict=True):
        assert one["batch_digest"] == other["batch_digest"]
        for key in first:
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=bound), key
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=20 * bound)
    assert chunked[0]["loss"] == pytest.approx(plain[0]["loss"], rel=min(1e-6, bound))
    return chunked


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("llama", {"zero_stage": 0}),
        ("bert", {"zero_stage": 1}),
        ("mixtral", {"zero_stage": 2}),
        ("t5", {"zero_stage": 3, "activation_checkpointing": True, "extra": EXTRA}),
    ],
)
def test_pretraining_is_the_same(
    corpus: Path, tmp_path: Path, kind: str, engine: dict[str, Any]
) -> None:
    validation = {"shards": str(corpus / "shards" / "validation"), "every_steps": 2, "rows": 12}
    values = pretraining(
        corpus,
        tmp_path,
        kind,
        kind,
        engine=engine,
        train={"steps": 2, "global_batch": 16, "micro_batch": 4},
        data={"validation": validation},
    )
    records = check_alike(values, bound=1e-5)
    assert records[-1]["validation_loss"] > 0


def test_a_capped_head_in_16_bit_is_chosen_by_its_size(corpus: Path, tmp_path: Path) -> None:
    values = pretraining(
        corpus,
        tmp_path,
        "gemma2",
        "llama",
        model={"architecture": "gemma2", "config": GEMMA2},
        engine={"zero_stage": 3, "precision": "bf16"},
        train={"steps": 2, "global_batch": 16, "micro_batch": 4},
    )
    check_alike(values, bound=2e-3, head="auto")


@pytest.mark.parametrize("adapters", [False, True])
def test_fine_tuning_is_the_same(tmp_path: Path, adapters: bool) -> None:
    """With smoothed labels, rows that only fill up, and a head that is frozen beside adapters."""
    words = tokenizer()
    sizes = {key: value for key, value in LLAMA["config"].items() if value}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, bos_token_id=1, **sizes)
    ).save_pretrained(tmp_path / "llama")
    words.save_pretrained(tmp_path / "llama")
    values = task_values(
        tmp_path,
        "translation",
        model={"pretrained": str(tmp_path / "llama"), "lora": {"r": 2} if adapters else None},
        data={"train": str(write_jsonl(tmp_path / "pairs.jsonl", toy(30))), "max_length": 24},
        task={
            "name": "translation",
            "options": {
                "prompt": "{source} =>",
                "max_target_length": 8,
                "label_smoothing": 0.1,
                "generation": {"max_new_tokens": 2},
            },
        },
        train={"steps": 2, "global_batch": 16, "micro_batch": 4},
        engine={"zero_stage": 3 if adapters else 1, "extra": EXTRA if adapters else {}},
    )
    check_alike(values, bound=1e-5)


def with_a_fault(values: dict[str, Any], fault: str) -> tuple[str, bool]:
    """Return what a run says whose head is asked wrongly, or whose model does what nobody hears;
    and whether it asked for chunks after all.
    """
    from hfscale.models import head as models
    from hfscale.objectives import chunked_head

    asked, usual, call = list[int](), chunked_head._few, models.nn.Linear.forward

    def wrong(*args: Any, **kwargs: Any) -> None:
        asked.append(1)
        usual(*args, **kwargs)
        if fault == "gradient" and kwargs["sloped"]:
            args[0].mul_(1.01)

    def silent(self: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        out = call(self, hidden)
        if self.out_features > 400:  # the head, by its vocabulary
            torch.ops.aten.mul_.Scalar(out, 0.9)  # no mode of torch's functions sees it
        return out

    chunked_head._few = wrong
    if fault == "loss":
        models.nn.Linear.forward = silent  # type: ignore[method-assign]
    before, chunked_head.LARGE = chunked_head.LARGE, 1
    try:
        train(values)
        asked_in_proof = 4  # and never again
        return "trained", len(asked) > asked_in_proof
    except ConfigError as error:
        return str(error), False
    finally:
        chunked_head._few, models.nn.Linear.forward = usual, call  # type: ignore[method-assign]
        chunked_head.LARGE = before


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("gradient", "gradients would be off by 1.0e-02 of their norm"),
        ("loss", "losses would be off by"),
    ],
)
def test_a_head_that_gives_something_else_is_not_used(
    corpus: Path, tmp_path: Path, fault: str, words: str
) -> None:
    values = pretraining(corpus, tmp_path, "run", "llama", train={"steps": 1, "micro_batch": 4})
    own = values | {"engine": values["engine"] | {"head": "auto"}}
    assert run_ranks(with_a_fault, 1, own, fault) == [("trained", False)]
    own |= {"engine": values["engine"] | {"head": "chunked"}, "run": values["run"] | {"name": "b"}}
    [(error, _)] = run_ranks(with_a_fault, 1, own, fault)
    assert words in error
    assert "engine.head" in error


def test_what_has_no_tokens_to_score_is_refused(corpus: Path, tmp_path: Path) -> None:
    values = pretraining(corpus, tmp_path, "run", "contrastive", engine={"head": "chunked"})
    [error] = run_ranks(refused, 1, values)
    assert "this objective asks for no tokens" in error


def refused(values: dict[str, Any]) -> str:
    try:
        train(values)
    except ConfigError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("engine", "words"),
    [({"compile": True}, "engine.compile=false"), ({"precision": "fp16"}, "engine.precision=bf16")],
)
def test_what_cannot_be_together_is_refused(
    corpus: Path, tmp_path: Path, engine: dict[str, Any], words: str
) -> None:
    values = pretraining(corpus, tmp_path, "run", "llama", engine=engine | {"head": "chunked"})
    [(key, why)] = problems(RunConfig.model_validate(values))
    assert key == "engine.head"
    assert words in why
