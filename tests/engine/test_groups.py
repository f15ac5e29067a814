"""Shares of the learning rate by depth, on real architectures."""

from __future__ import annotations

import re

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
    beside = {f"model.{stack}.layernorm_embedding.bias" for stack in ("encoder", "decoder")}
    assert {bart[name] for name in beside} == {4}  # listed after the layers, but an embedding's
    opt = depths(AutoModelForCausalLM, "opt", **SMALL, ffn_dim=16, word_embed_proj_dim=8)
    assert opt["model.decoder.project_in.weight"] == 4
    assert opt["model.decoder.project_out.weight"] == 0  # listed before the layers, but after them
    assert opt["model.decoder.final_layer_norm.bias"] == 0


@pytest.mark.parametrize(
    ("kind", "config", "kept", "decayed"),
    [
        ("cohere", SMALL | {"use_qk_norm": True}, r"norm", r"proj|mlp|embed"),
        (
            "gpt_oss",
            SMALL | {"num_local_experts": 4, "head_dim": 16},
            r"norm|bias|sinks",
            r"proj(\.weight)?$|router\.weight|embed|lm_head",
        ),
        (
            "mamba",
            {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
            r"norm|bias|A_log|D$",
            r"conv1d\.weight|_proj\.weight|embed|lm_head",
        ),
        (
            "rwkv",
            {
                "vocab_size": 40,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "attention_hidden_size": 16,
            },
            r"time_|\.(pre_)?ln|ln_out",
            r"(key|value|receptance|output)\.weight|embed|head",
        ),
        (
            "xlnet",
            {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16},
            r"norm|bias|mask_emb",
            r"\.[qkvor]$|seg_embed|layer_[12]\.weight|embedding|loss\.weight",
        ),
    ],
)
def test_decay_goes_by_what_a_parameter_is(kind, config, kept, decayed):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    rates = {
        p: group["weight_decay"] for group in param_groups(model, Optim()) for p in group["params"]
    }
    for name, param in model.named_parameters():
        expected = bool(re.search(decayed, name)) and not re.search(kept, name)
        assert bool(re.search(kept, name)) or expected, f"the test does not know {name}"
        assert (rates[param] > 0) == expected, name


def test_a_head_of_one_row_is_a_matrix():
    head = torch.nn.Linear(8, 1)
    assert [len(group["params"]) for group in param_groups(head, Optim())] == [1, 1]


def test_without_decay_there_are_two_groups_and_without_layers_there_is_no_share():
    model = torch.nn.Linear(2, 2)
    assert [
        (group["weight_decay"], group["lr_share"]) for group in param_groups(model, Optim())
    ] == [(0.1, 1.0), (0.0, 1.0)]
    with pytest.raises(ConfigError, match="no numbered layers"):
        param_groups(model, Optim(layer_decay=0.5))
