"""A model that only computes: at ZeRO 3 each rank holds a share, and the answers are those of the
whole model, bit for bit in fp32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfscale.config.inference import Inference
from hfscale.dist import group
from hfscale.dist.world import World
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import ConfigError
from tests.engine.tiny import rows, tiny_model
from tests.helpers.ranks import run_ranks

# else what is as small as this model stays whole
SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def whole(precision: str) -> Any:
    return tiny_model().to(PRECISIONS[precision]).eval()


def on_ranks(how: dict[str, Any], precision: str) -> tuple[torch.Tensor, int, bool]:
    """Return this rank's logits of the tiny model, how many elements it holds, and whether it
    computes together with others.
    """
    state = whole(precision).state_dict()

    def build(context: Any) -> torch.nn.Module:
        with context():
            return whole(precision)

    engine = InferenceEngine.create(
        build, how=Inference(**how), precision=precision, device=torch.device("cpu")
    )
    held = 0
    with torch.no_grad():
        for fragment in engine.fragments():
            held += fragment.numel
            fragment.tensors["weight"].copy_(
                state[fragment.name].flatten()[fragment.start : fragment.start + fragment.numel]
            )
        engine.after_load()
        logits = engine(input_ids=rows(engine.all.rank)[0]).logits.clone()
    together = engine.together
    engine.close()
    engine.close()
    return logits, held, together


@pytest.mark.parametrize(
    ("how", "precision"),
    [
        ({"zero_stage": 3, "extra": SPLIT_ALL}, "fp32"),
        ({"zero_stage": 3, "offload": "parameters", "extra": SPLIT_ALL}, "bf16"),
        ({"zero_stage": 2}, "fp32"),
    ],
)
def test_logits_are_those_of_the_whole_model(how: dict[str, Any], precision: str) -> None:
    numel, parts = (
        sum(p.numel() for p in whole(precision).parameters()),
        run_ranks(on_ranks, 2, how, precision),
    )
    for rank, (logits, held, together) in enumerate(parts):
        with torch.no_grad():
            assert torch.equal(logits, whole(precision)(input_ids=rows(rank)[0]).logits)
        assert together == (how["zero_stage"] == 3)
        assert held == numel if how["zero_stage"] < 3 else abs(held - numel / 2) < 0.01 * numel


def test_what_cannot_run_is_refused() -> None:
    group.start(World())
    try:
        for how, precision, message in (
            ({"zero_stage": 3}, "fp16", "fp16 needs a GPU"),
            (
                {"zero_stage": 3, "extra": {"bf16": {"enabled": True}}},
                "fp32",
                "engine.extra repeats",
            ),
        ):
            with pytest.raises(ConfigError, match=message):
                InferenceEngine.create(
                    lambda _: whole("fp32"),
                    how=Inference(**how),
                    precision=precision,
                    device=torch.device("cpu"),
                )
    finally:
        group.shutdown()
