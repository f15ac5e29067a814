"""Shares of the learning rate by depth, on real architectures."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from hfscale.config.schema import Optim
from hfscale.engine.groups import param_groups
from hfscale.errors import ConfigError

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def depths(auto: type, kind: str, **config: int) -> dict[str, int]:
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(kind, **config))
    names = {param: name for name, param in model.named_parameters()}
    groups = param_groups(model, Optim(layer_decay=0.5))
    found = {names[param]: group["lr_share"] for group in groups for param in group["params"]}
    assert len(found) == len(names)
    return {name: round(-torch.log2(torch.tensor(share)).item()) for name, share in found.items()}


def test_a_layer_gets_a_share_of_the_one_above_it():
    bert = depths(AutoModelForSequenceClassification, "bert", **SMALL)
    assert {bert["classifier.weight"], bert["bert.pooler.dense.bias"]} == {0}
    assert [bert[f"bert.encoder.layer.{n}.output.dense.weight"] for n in range(3)] == [3, 2, 1]
    assert {depth for name, depth in bert.items() if "embeddings" in name} == {4}
    llama = depths(AutoModelForCausalLM, "llama", **SMALL)
    assert (
        llama["lm_head.weight"] == llama["model.norm.weight"] == 0
        and llama["model.embed_tokens.weight"] == 4
    )
    gpt2 = depths(AutoModelForCausalLM, "gpt2", vocab_size=40, n_embd=16, n_layer=3, n_head=2)
    assert (
        gpt2["transformer.wpe.weight"],
        gpt2["transformer.h.0.ln_1.weight"],
        gpt2["transformer.ln_f.bias"],
    ) == (4, 3, 0)
    bart = depths(
        AutoModelForSeq2SeqLM,
        "bart",
        vocab_size=40,
        d_model=16,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    assert [bart[f"model.{stack}.layers.0.fc1.weight"] for stack in ("encoder", "decoder")] == [
        3,
        2,
    ]
    assert {bart["model.shared.weight"], bart["model.decoder.embed_positions.weight"]} == {4}


def test_without_decay_there_are_two_groups_and_without_layers_there_is_no_share():
    model = torch.nn.Linear(2, 2)
    assert [
        (group["weight_decay"], group["lr_share"]) for group in param_groups(model, Optim())
    ] == [(0.1, 1.0), (0.0, 1.0)]
    with pytest.raises(ConfigError, match="no numbered layers"):
        param_groups(model, Optim(layer_decay=0.5))
