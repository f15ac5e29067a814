"""What a trace on the meta device says a step holds, against the storages of the same step on real
tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from hfscale.models.call import call
from hfscale.models.head import After
from hfscale.objectives import chunked_head, cross_entropy
from hfscale.objectives.chunked_head import ChunkedHead
from hfscale.objectives.cross_entropy import token_losses
from hfscale.planning.layers import trace_deep
from hfscale.planning.tracing import Watch, checkpoint

ROWS, TOKENS = 2, 48
SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}  # padding is looked for
GROUPED = SIZES | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "AutoModelForCausalLM",
        {"vocab_size": 211, "n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 64, **IDS},
    ),
    "llama": ("AutoModelForCausalLM", GROUPED),
    "qwen3": ("AutoModelForCausalLM", GROUPED | {"head_dim": 32}),
    "gemma3_text": ("AutoModelForCausalLM", GROUPED | {"head_dim": 32, "num_hidden_layers": 14}),
    "gpt_neox": ("AutoModelForCausalLM", SIZES),
    "opt": ("AutoModelForCausalLM", SIZES | {"ffn_dim": 96}),
    "mixtral": (
        "AutoModelForCausalLM",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "bert": ("AutoModelForMaskedLM", SIZES),
    "modernbert": ("AutoModelForMaskedLM", SIZES | {"cls_token_id": 1, "sep_token_id": 1}),
    "t5": (
        "AutoModelForSeq2SeqLM",
        {"vocab_size": 211, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 5, "num_heads": 4},
    ),
    "bart": (
        "AutoModelForSeq2SeqLM",
        {
            **{"vocab_size": 211, "d_model": 64, "encoder_layers": 5, "decoder_layers": 5},
            **{"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_attention_heads": 4},
            **{"decoder_attention_heads": 4, "max_position_embeddings": 64},
        },
    ),
}


def model_of(kind: str, device: str, dtype: torch.dtype, checkpointing: bool) -> Any:
    auto_model, values = FAMILIES[kind]
    config = AutoConfig.for_model(kind, **values)
    for key in vars(config):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)  # with it a CPU does not fuse attention
    with torch.device(device):
        model = getattr(transformers, auto_model).from_config(config, dtype=dtype)
        model.tie_weights()
    model.train()
    if checkpointing and device == "meta":
        checkpoint(model, on_cpu=True)
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def loss_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    inputs = {"input_ids": ids_BT}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = ids_BT
    return token_losses(call(model, **inputs).logits, ids_BT).sum()


def chunked_loss_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    head = ChunkedHead(After())
    return head.scores(model, ids_BT, lambda: call(model, input_ids=ids_BT).logits).losses_BT.sum()


def seen_on_a_cpu(
    model: Any, loss_of: Callable[[nn.Module, Tensor], Tensor] = loss_of
) -> tuple[int, int]:
    """Return the bytes that a real step holds after its forward pass, and at most."""
    ids_BT = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
    watch = Watch([*model.parameters(), *model.buffers(), ids_BT])
    with watch:
        loss = loss_of(model, ids_BT)
        saved = watch.live
        loss.backward()
    return saved, watch.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_trace_is_what_a_step_holds(kind: str, checkpointing: bool):
    dtype = torch.bfloat16 if kind in ("llama", "bert") else torch.float32
    saved, peak = seen_on_a_cpu(model_of(kind, "cpu", dtype, checkpointing))
    model = model_of(kind, "meta", dtype, checkpointing)
    ids_BT = torch.zeros(ROWS, TOKENS, dtype=torch.int64, device="meta")
    deep = trace_deep(model, lambda one: loss_of(one, ids_BT), inputs=[ids_BT], on_cpu=True)
    assert deep.of(lambda one: one.saved) == pytest.approx(saved, rel=0.01)
    # in a model this small the fullest moment may lie in other layers, the deeper it is
    assert deep.of(lambda one: one.peak) == pytest.approx(peak, rel=0.05)


def test_a_trace_of_a_chunked_head_has_no_logits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 4 * 211 * 32)
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 211 * 8)
    saved, peak = seen_on_a_cpu(model_of("llama", "cpu", torch.float32, False), chunked_loss_of)
    model = model_of("llama", "meta", torch.float32, False)
    ids_BT = torch.zeros(ROWS, TOKENS, dtype=torch.int64, device="meta")
    deep = trace_deep(model, lambda one: chunked_loss_of(one, ids_BT), inputs=[ids_BT], on_cpu=True)
    assert deep.of(lambda one: one.saved) == pytest.approx(saved, rel=0.01)
    assert deep.of(lambda one: one.peak) == pytest.approx(peak, rel=0.05)
