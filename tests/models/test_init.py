"""First weights: a function of seed and path alone, whatever the stage, world size and
precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from hfscale.errors import ConfigError
from hfscale.models.build import build_model
from hfscale.models.init import initialize
from tests.engine.tiny import tiny_config
from tests.helpers.ranks import run_ranks
from tests.models.families import FAMILIES, SPECIAL_IDS, VOCAB


def build(family: str, *, seed: int = 3, **placement: Any) -> nn.Module:
    auto_model, model = FAMILIES[family]
    return build_model(
        model,
        auto_model=auto_model,
        vocab_size=VOCAB,
        seq_len=32,
        seed=seed,
        overrides=SPECIAL_IDS,
        **placement,
    )


def digests(
    model: nn.Module, gather: Any = None, dtype: torch.dtype = torch.float32
) -> dict[str, str]:
    """Return a digest of every parameter (whole, as ``dtype``) and float buffer, by name; also of
    tied names.
    """
    out = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if gather and isinstance(tensor, nn.Parameter):
            with gather([tensor]):
                value = tensor.detach().to(dtype)
        else:
            value = tensor.detach().to(dtype) if isinstance(tensor, nn.Parameter) else tensor
        out[name] = hashlib.sha256(value.float().contiguous().numpy().tobytes()).hexdigest() + str(
            tuple(value.shape)
        )
    return out


def zero3_digests(family: str, precision: str) -> tuple[dict[str, str], int, int]:
    """Run on each rank: digests of a ZeRO 3 build, numbers held by this rank, numbers in the
    model.
    """
    from hfscale.engine.start import construction, gathered

    def gather(params: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        return gathered(params, modify=True)

    config = tiny_config(3, precision, world_size=2)
    model = build(family, context=lambda: construction(config, device_type="cpu"), gather=gather)
    assert all(p.numel() == 0 for p in model.parameters()), "a parameter was left whole"
    held = sum(p.ds_tensor.numel() for p in model.parameters())
    return digests(model, gather), held, sum(p.ds_numel for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero3_on_two_ranks_equals_a_plain_build(family: str, precision: str) -> None:
    plain = digests(build(family), dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    for built, held, total in run_ranks(zero3_digests, 2, family, precision):
        assert built == plain
        assert held <= total / 2 + 100 * len(built)  # padding of each parameter aside


@pytest.mark.parametrize("family", FAMILIES)
def test_first_weights_have_the_spread_that_transformers_gives_them(family: str) -> None:
    ours = build(family)
    torch.manual_seed(0)
    theirs = type(ours)(ours.config)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        chance = 5 / (2 * q.numel()) ** 0.5  # five standard errors of a standard deviation
        assert p.std(correction=0).item() == pytest.approx(
            q.std(correction=0).item(), rel=2 * chance, abs=1e-6
        ), name
        assert p.mean().item() == pytest.approx(
            q.mean().item(), abs=4 * q.std(correction=0).item() / q.numel() ** 0.5 + 1e-6
        ), name


def test_seed_and_path_decide_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = digests(build("llama"))
    state = torch.get_rng_state()
    assert digests(build("llama")) == first
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    other = digests(build("llama", seed=4))
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if "norm" not in name and "inv_freq" not in name}
    weights = [first[f"model.layers.{i}.self_attn.{p}_proj.weight"] for i in (0, 1) for p in "qo"]
    assert len(set(weights)) == 4  # equal shapes, different paths


def test_a_16_bit_build_is_the_rounded_fp32_build() -> None:
    assert digests(build("gpt2", dtype=torch.bfloat16)) == digests(
        build("gpt2"), dtype=torch.bfloat16
    )


def test_ties_hold() -> None:
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_tied_embedding_is_drawn_as_an_embedding_not_as_the_head() -> None:
    weight = build("bert").bert.embeddings.word_embeddings.weight
    assert (weight[SPECIAL_IDS["pad_token_id"]] == 0).all()
    assert (weight[SPECIAL_IDS["pad_token_id"] + 1] != 0).all()


def test_undrawn_parameters_are_named() -> None:
    class Odd(GPT2LMHeadModel):
        def __init__(self, config: GPT2Config) -> None:
            super().__init__(config)
            self.table = nn.Parameter(torch.arange(6.0).view(2, 3))  # no one says how it starts
            # a constant vector is its own first value
            self.scale = nn.Parameter(torch.full((3,), 0.5))

    with no_init_weights():
        model = Odd(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11))
    assert initialize(model, seed=0) == ["table"]
    assert model.table.isnan().all()
    assert (model.scale == 0.5).all()


def test_an_architecture_that_reaches_too_deep_is_refused_when_partitioned() -> None:
    config = SwitchTransformersConfig(
        vocab_size=50,
        d_model=8,
        d_ff=8,
        d_kv=4,
        num_layers=2,
        num_heads=2,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    with no_init_weights():
        model = SwitchTransformersForConditionalGeneration(config)
    # whole parameters: any depth will do
    initialize(model, seed=0, gather=lambda params: nullcontext())
    for param in model.parameters():
        param.ds_id = 0  # as at ZeRO 3
    with pytest.raises(ConfigError, match="deeper"):
        initialize(model, seed=0, gather=lambda params: nullcontext())
