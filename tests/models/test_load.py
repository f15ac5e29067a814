"""Pretrained weights under other names, from other heads, whole or partitioned."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertForMaskedLM, GPT2Model

from hfscale.errors import CheckpointError
from hfscale.models.build import build_model
from hfscale.models.load import load_weights
from tests.engine.tiny import tiny_config
from tests.helpers.ranks import run_ranks
from tests.models.families import FAMILIES, VOCAB


class DictReader:
    """Weights from a dict: the reader's contract, without a file."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def names(self) -> list[str]:
        return list(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weights[name].shape)

    def read(self, name: str) -> Tensor:
        return self.weights[name]


def build(family: str, seed: int) -> nn.Module:
    auto_model, model = FAMILIES[family]
    return build_model(model, auto_model=auto_model, vocab_size=VOCAB, seq_len=32, seed=seed)


def equal(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_own_weights_come_back(family: str) -> None:
    source, model = build(family, 1), build(family, 2)
    weights = {name: p.detach() for name, p in source.named_parameters()}  # each tied parameter once
    loaded = load_weights(model, DictReader(weights))
    assert not loaded.missing
    assert not loaded.unexpected
    assert equal(model, source)


def test_a_headless_model_fills_all_but_the_head() -> None:
    source, model = AutoModel.from_config(build("bert", 1).config), build("bert", 2)
    head = model.cls.predictions.transform.dense.weight.clone()
    loaded = load_weights(model, DictReader(source.state_dict()))
    assert torch.equal(model.bert.encoder.layer[1].output.dense.weight, source.encoder.layer[1].output.dense.weight)
    assert all(name.startswith("cls.") for name in loaded.missing)
    assert loaded.unexpected == ("pooler.dense.bias", "pooler.dense.weight")
    assert torch.equal(model.cls.predictions.transform.dense.weight, head)


def test_a_whole_model_fills_a_headless_one() -> None:
    source = build("gpt2", 1)
    model = GPT2Model(source.config)
    load_weights(model, DictReader(source.state_dict()))
    assert torch.equal(model.wte.weight, source.transformer.wte.weight)


def test_old_names_of_layer_norms() -> None:
    source, model = build("bert", 1), build("bert", 2)
    assert isinstance(source, BertForMaskedLM)
    nn.init.normal_(source.bert.embeddings.LayerNorm.weight)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in source.state_dict().items()}  # fmt: skip
    assert not load_weights(model, DictReader(old)).missing
    assert equal(model, source)


def test_weights_that_do_not_fit_are_refused() -> None:
    model = build("gpt2", 1)
    with pytest.raises(CheckpointError, match=r"\(320, 32\)"):
        load_weights(model, DictReader({"wte.weight": torch.zeros(10, 32)}))
    with pytest.raises(CheckpointError, match="none of"):
        load_weights(model, DictReader({"vision.patch": torch.zeros(3)}))


def load_partitioned(weights: dict[str, Tensor]) -> bool:
    from hfscale.engine.engine import construction, gathered

    def gather(params: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        return gathered(params, modify=True)

    auto_model, config = FAMILIES["gpt2"]
    model = build_model(config, auto_model=auto_model, vocab_size=VOCAB, seq_len=32, seed=2, gather=gather,
                        context=lambda: construction(tiny_config(3, world_size=2), device_type="cpu"))  # fmt: skip
    load_weights(model, DictReader(weights), gather)
    assert all(p.numel() == 0 for p in model.parameters())
    with gather(list(model.parameters())):
        return all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_partitioned_parameters_are_filled_too() -> None:
    weights = {name: p.detach() for name, p in build("gpt2", 1).named_parameters()}
    assert run_ranks(load_partitioned, 2, weights) == [True, True]
