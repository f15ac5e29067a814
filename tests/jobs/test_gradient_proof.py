"""Before the first step the engine's gradient is held against plain autograd: it is right at every
stage, precision and size, for every way to pretrain, and a wrong one is refused and named.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.finetune import FinetuneConfig
from hfscale.errors import ConfigError
from tests.helpers.corpus import run_values
from tests.helpers.labelled import make_encoder, reviews, task_values, write_jsonl
from tests.helpers.pretraining import PRETRAINING, pretraining
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow
TWO_EACH = {"steps": 1, "global_batch": 16, "micro_batch": 4}  # on two ranks


def proof_of(root: Path, name: str = "run") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / name / "gradient.json").read_text())
    return content


@pytest.mark.parametrize("kind", PRETRAINING)
def test_every_way_to_pretrain_is_proven(corpus: Path, tmp_path: Path, kind: str) -> None:
    """At ZeRO 3, where the bare module is a copy; test_parity.py starts all of them below."""
    values = pretraining(corpus, tmp_path, "run", kind, train=TWO_EACH, engine={"zero_stage": 3})
    run_ranks(train, 2, values)
    proof = proof_of(tmp_path)
    assert (proof["zero_stage"], proof["ranks"], proof["micro_batches"]) == (3, 2, 2)
    assert len(proof["parameters"]) >= 4
    assert max(one["off"] for one in proof["parameters"]) < 1e-4
    assert sum(one["plain"] > 0 for one in proof["parameters"]) >= 3


@pytest.mark.parametrize(
    ("stage", "precision", "more"),
    [
        (0, "fp32", {}),
        (1, "bf16", {"activation_checkpointing": True}),
        (2, "fp32", {}),
        (2, "bf16", {"offload": "optimizer"}),
        (3, "bf16", {"activation_checkpointing": True}),
    ],
)
def test_every_stage_and_precision_is_proven_and_nothing_else_changes(
    corpus: Path, tmp_path: Path, stage: int, precision: str, more: dict[str, Any]
) -> None:
    records = {}
    for prove in (True, False):
        engine = {"zero_stage": stage, "precision": precision, "prove": prove, **more}
        steps = {"steps": 2, "global_batch": 16, "micro_batch": 4}
        values = run_values(corpus, tmp_path, f"{prove}", engine=engine, train=steps)
        [records[prove], _] = run_ranks(train, 2, values)
        values["train"]["steps"] = 4  # and at the resume, on one rank
        records[prove] += run_ranks(train, 1, values)[0]
    exact = ("loss", "grad_norm", "batch_digest")
    for one, other in zip(records[True], records[False], strict=True):
        assert [one[key] for key in exact] == [other[key] for key in exact]
    assert proof_of(tmp_path, "True")["ranks"] == 1, "that of the newest start"
    assert not (tmp_path / "False" / "gradient.json").exists()


def test_a_fine_tuning_with_dropout_is_proven(tmp_path: Path) -> None:
    make_encoder(tmp_path / "encoder")
    write_jsonl(tmp_path / "reviews.jsonl", reviews(60))
    values = task_values(tmp_path, "run", train={"steps": 1}, engine={"zero_stage": 2})
    FinetuneConfig.model_validate(values)
    run_ranks(train, 2, values)
    proof = proof_of(tmp_path / "runs")
    assert max(one["off"] for one in proof["parameters"]) < 1e-4


def spoiled(values: dict[str, Any], fault: str) -> str:
    """Return what a run says whose engine adds its gradients up wrongly; for ``run_ranks``."""
    from hfscale.engine.engine import Engine

    backward: Callable[[Engine, Any], None] = Engine.backward
    calls = list[int]()

    def wrong(self: Engine, loss: Any) -> None:
        calls.append(1)
        if fault == "first lost" and len(calls) % 2:
            return
        scale = 0.0 if fault == "one rank" and self.all.rank else 1.0
        factors = {"ranks": float(self.all.size), "micros": 1 / 2, "odd": 1.07}
        backward(self, loss * factors.get(fault, 1.0) * scale)

    Engine.backward = wrong  # type: ignore[method-assign]
    try:
        train(values)
    except ConfigError as error:
        return str(error)
    finally:
        Engine.backward = backward  # type: ignore[method-assign]
    return "trained"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("first lost", "that of the last micro-batch of each rank alone"),
        ("one rank", "that of the rows of rank 0 alone"),
        ("ranks", "that of a whole step, times the 2 ranks or the 2 micro-batches"),
        ("micros", "that of a whole step, divided by the 2 ranks or"),
        ("odd", "that of a whole step, times 1.07"),
        ("none", "trained"),
    ],
)
def test_a_wrong_gradient_is_refused_and_named(
    corpus: Path, tmp_path: Path, fault: str, words: str
) -> None:
    for stage in (1, 3):
        engine = {"zero_stage": stage, "precision": "bf16"}
        values = run_values(corpus, tmp_path, f"run-{stage}", train=TWO_EACH, engine=engine)
        for refusal in run_ranks(spoiled, 2, values, fault):
            assert words in refusal, refusal
            assert fault == "none" or "nothing was trained" in refusal
