"""LayerDrop at every stage beside transformers' own, of one process that does one rank's work after
the other's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from hfscale.config.schema import Model
from hfscale.engine.engine import Engine
from hfscale.engine.layer_drop import take_over_layer_drop
from hfscale.engine.start import construction, gathered
from hfscale.errors import ConfigError
from hfscale.models.build import build_model
from tests.engine.tiny import full_state, tiny_config
from tests.helpers.ranks import run_ranks

PERSIST_NOTHING = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


OPT = Model.model_validate(
    {
        "architecture": "opt",
        "attention": "eager",
        "config": {
            "hidden_size": 16,
            "ffn_dim": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "word_embed_proj_dim": 16,
            "dropout": 0.1,
            "layerdrop": 0.5,
        },
    }
)


def tiny_opt(**at_stage_3: Any) -> nn.Module:
    return build_model(
        OPT, auto_model="AutoModelForCausalLM", vocab_size=40, seq_len=8, seed=5, **at_stage_3
    )


def seed_and_ids(step: int, rank: int, micro: int) -> torch.Tensor:
    torch.manual_seed(1000 * step + 100 * rank + micro)
    return torch.randint(4, 40, (2, 8))


def draws_in_vain() -> bool:
    """Return whether this transformers draws for each layer where none is to be dropped."""
    model = tiny_opt()
    model.model.decoder.layerdrop = 0.0
    for module in model.modules():
        module.dropout = 0.0
    before = torch.get_rng_state()
    model(input_ids=torch.full((1, 2), 4))
    return not torch.equal(before, torch.get_rng_state())


def expected(steps: int = 2) -> list[dict[str, torch.Tensor]]:
    """Return the mean gradient of each step over two ranks with two micro-batches each, by
    transformers alone.
    """
    model, found = tiny_opt(), []
    for step in range(steps):
        for rank in range(2):
            for micro in range(2):
                ids = seed_and_ids(step, rank, micro)
                (model(input_ids=ids, labels=ids).loss / 2).backward()
        found.append(
            {n: p.grad.clone().flatten() for n, p in model.named_parameters() if p.grad is not None}
        )
        model.zero_grad()
    return found


def gradients(stage: int, steps: int = 2, **options: object) -> list[dict[str, torch.Tensor]]:
    config = tiny_config(stage, world_size=2, clip_norm=0, **options)
    model = tiny_opt(
        gather=partial(gathered, modify=True),
        context=partial(construction, config, device_type="cpu"),
    )
    engine = Engine.create(model, config=config, device=torch.device("cpu"))
    beta, before, found = config.optim.betas[0], {}, []
    for step in range(steps):
        for micro in range(2):
            ids = seed_and_ids(step, engine.all.rank, micro)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step(0.0)
        moments = {name: tensors["exp_avg"] for name, tensors in full_state(engine).items()}
        found.append({n: (m - beta * before.get(n, 0.0)) / (1 - beta) for n, m in moments.items()})
        before = moments
    engine.close()
    return found


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (2, {}),
        (3, {"extra": PERSIST_NOTHING}),
        pytest.param(0, {}, marks=pytest.mark.slow),
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(1, {"activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(
            3, {"extra": PERSIST_NOTHING, "activation_checkpointing": True}, marks=pytest.mark.slow
        ),
    ],
)
def test_dropped_layers_are_those_of_transformers_at_every_stage(stage, options, monkeypatch):
    ranks = run_ranks(gradients, 2, stage, **options)
    if draws_in_vain():  # before transformers 5.21: our draw is then the second
        rand = torch.rand
        monkeypatch.setattr(torch, "rand", lambda size: (rand(size), rand(size))[1])
    for rank in ranks:
        for seen, right in zip(rank, expected(), strict=True):
            for name, gradient in seen.items():
                torch.testing.assert_close(
                    gradient, right.get(name, torch.zeros_like(gradient)), atol=2e-6, rtol=1e-4
                )


def test_a_model_whose_layers_are_no_modules_is_refused():
    from transformers import FlaubertConfig, FlaubertWithLMHeadModel

    model = FlaubertWithLMHeadModel(
        FlaubertConfig(vocab_size=40, emb_dim=16, n_layers=2, n_heads=2, layerdrop=0.1)
    )
    with pytest.raises(ConfigError, match="layerdrop"):
        take_over_layer_drop(model)
