"""Flops a token, against a count by torch of every matrix product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from hfscale.models.flops import flops_per_token, peak_flops

TOKENS = 32
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
GROUPED = SMALL | IDS | {"num_key_value_heads": 2}
BART = {
    "vocab_size": 97,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
} | IDS
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 8},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 64},
    "gemma3_text": GROUPED | {"head_dim": 64},
    "olmo2": GROUPED,
    "cohere": GROUPED,
    "phi3": GROUPED,
    "stablelm": GROUPED,
    "gpt_neox": SMALL | IDS,
    "bloom": {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4} | IDS,
    "opt": SMALL | IDS | {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "mixtral": GROUPED | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": GROUPED
    | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32},
    "olmoe": GROUPED | {"num_experts": 8, "num_experts_per_tok": 3},
    "granitemoe": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "bert": SMALL | IDS,
    "roberta": SMALL | IDS,
    "electra": SMALL | IDS | {"embedding_size": 32},
    "distilbert": {"vocab_size": 97, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
    "albert": SMALL | IDS | {"embedding_size": 32, "num_hidden_layers": 4, "num_hidden_groups": 2},
    "modernbert": SMALL | IDS | {"cls_token_id": 1, "sep_token_id": 1, "local_attention": 8},
    "t5": {
        "vocab_size": 97,
        "d_model": 64,
        "d_ff": 96,
        "d_kv": 32,
        "num_layers": 2,
        "num_heads": 4,
    },
    "bart": BART,
    "mbart": BART,
    "pegasus": BART,
}
ENCODERS = {"bert", "roberta", "electra", "distilbert", "albert", "modernbert"}


def counted_and_said(
    kind: str, prepare: Any = lambda model: None, **more: int
) -> tuple[float, float]:
    config = AutoConfig.for_model(kind, **MODELS[kind] | more)
    seq2seq = {"decoder_start_token_id": 0} if config.is_encoder_decoder else {}
    config.update(seq2seq)
    head = "MaskedLM" if kind in ENCODERS else "Seq2SeqLM" if seq2seq else "CausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(
        config, attn_implementation="eager"
    )
    if hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    prepare(model)
    ids = torch.randint(5, 90, (2, TOKENS))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if seq2seq else {})
    with FlopCounterMode(display=False) as counter:
        model.train()(**inputs).logits.sum().backward()
    return counter.get_total_flops() / ids.numel(), flops_per_token(model, seq_len=TOKENS)


@pytest.mark.parametrize("kind", MODELS)
def test_the_formula_agrees_with_counting(kind: str) -> None:
    counted, said = counted_and_said(kind)
    assert said == pytest.approx(counted, rel=0.02)


def frozen_below(model: Any) -> None:
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[:12].requires_grad_(False)


def adapters(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), model)


@pytest.mark.parametrize("prepare", [frozen_below, adapters])
def test_what_is_frozen_has_no_gradient_of_its_own(prepare: Any) -> None:
    counted, said = counted_and_said("llama", prepare, num_hidden_layers=24)
    # the layer at the edge, one of 24, is not split
    assert said == pytest.approx(counted, rel=0.02)


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), precision="bf16") is None
