"""How many floating-point operations a token costs, and how many a device can do: their ratio is
the MFU.

    flops a token = 2 N (forward) + 2 N' (backward, to inputs) + 2 N" (to weights) + 12 A T

N weights in matrix products, as often as a token uses them: of E experts k, of shared layers each
time; N' without what lies below all trained ones, N" the trained ones. A: heads times their width,
over all attentions (an encoder-decoder has three a layer), T = ``seq_len``. Within 2 % of torch's
own count (tests/models/test_flops.py). Not counted: recomputation, what masks save (half of a
causal one, windows, documents), scans of state-space models, products with relative positions
(DeBERTa, XLNet). Source: Chowdhery et al. 2022, PaLM, appendix B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfscale.models.devices import device_seen

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

LAYER = re.compile(r"\.\d+(\.|$)")  # in the path of what belongs to a numbered layer
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")  # in the path of an expert that is a module of its own


def flops_per_token(model: PreTrainedModel, *, seq_len: int) -> float:
    """Return the flops of training on one token, forward and backward. The model may be partitioned
    or on the meta device.
    """
    from torch import nn

    flops, trained = 0.0, False
    layers = {True: 0, False: 0}  # weights of layers by whether gradients pass through them
    for path, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            # gradients pass through what comes after, not before
            trained = trained or weight.requires_grad
            shape = getattr(weight, "ds_shape", weight.shape)
            if isinstance(module, nn.Embedding) or sum(size > 1 for size in shape) < 2:
                continue  # looked up (as an output matrix it is a module of its own), or added
            each = 6.0 if weight.requires_grad else 4.0 if trained else 2.0
            layers[trained] += math.prod(shape) if LAYER.search(path) else 0
            flops += each * math.prod(shape) * _uses(model.config, path, shape)
    passed = layers[True] / (sum(layers.values()) or 1)
    return flops + (4.0 + 8.0 * passed) * seq_len * _attention_width(model.config)


def _uses(config: PretrainedConfig, path: str, shape: Sequence[int]) -> float:
    """Return how often a token is multiplied by a weight: for an expert, on average."""
    experts = max(
        _numbers(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        default=0,
    )
    if experts and ((len(shape) == 3 and shape[0] == experts) or EXPERT.search(path)):
        return (
            max(
                _numbers(config, "num_experts_per_tok", "num_experts_per_token", "top_k", "moe_k"),
                default=1,
            )
            / experts
        )
    if config.model_type == "albert" and ".albert_layers." in path:
        groups, members = int(config.num_hidden_groups), int(config.inner_group_num)
        return int(config.num_hidden_layers) / (groups * members) * members
    return 1.0


def _attention_width(config: PretrainedConfig) -> float:
    """Return the mean width of keys and values of all heads, summed over the attentions of the
    model.
    """
    heads = next(iter(_numbers(config, "num_attention_heads", "num_heads", "n_heads")), 0)
    if not heads:
        return 0.0
    head = next(iter(_numbers(config, "head_dim", "d_kv", "d_head")), config.hidden_size / heads)
    key = next(iter(_numbers(config, "qk_head_dim")), head)
    value = next(iter(_numbers(config, "v_head_dim")), head)
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    layers = (
        sum("attention" in kind and "linear" not in kind for kind in types)
        if types
        else config.num_hidden_layers
    )
    if config.is_encoder_decoder:  # the decoder attends to itself and to the encoder
        layers += 2 * next(iter(_numbers(config, "num_decoder_layers", "decoder_layers")), layers)
    return layers * heads * (key + value) / 2


def _numbers(config: PretrainedConfig, *keys: str) -> list[int]:
    values = (getattr(config, key, None) for key in keys)
    return [value for value in values if isinstance(value, int) and value > 0]


def peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Return the flop/s of ``device`` in 16-bit tensor cores, whatever ``precision`` runs there;
    None on a CPU or unknown GPU.

    fp32 is measured against the same peak: it shows what 16 bits would gain.
    """
    if device.type != "cuda":
        return None
    import torch

    known = device_seen(torch.cuda.get_device_name(device))
    return known.flops_16 if known else None
