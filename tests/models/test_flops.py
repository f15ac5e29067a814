"""Flops a token, against a count by torch of every matrix product."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hfscale.models.build import build_model
from hfscale.models.flops import flops_per_token, peak_flops
from tests.models.families import FAMILIES


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_formula_agrees_with_counting(family: str) -> None:
    auto_model, model = FAMILIES[family]
    built = build_model(
        model.model_copy(update={"attention": "eager"}),
        auto_model=auto_model,
        vocab_size=320,
        seq_len=64,
        seed=0,
    )
    with FlopCounterMode(display=False) as counter:
        built(torch.zeros(2, 64, dtype=torch.long)).logits.sum().backward()
    counted = counter.get_total_flops() / (2 * 64)
    formula = flops_per_token(
        built.config, seq_len=64, parameters=sum(p.numel() for p in built.parameters())
    )
    assert formula == pytest.approx(
        counted, rel=0.08
    )  # learned positions (7 % of this tiny GPT-2) and norms are no products


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), precision="bf16") is None
