"""What AdamW does to each parameter: which decay, and with which share of the learning rate.

Layer-wise learning-rate decay: Howard & Ruder 2018 (ULMFiT, "discriminative fine-tuning"); Clark et al. 2020 (ELECTRA).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from hfscale.config.schema import Optim
from hfscale.errors import ConfigError

LAYER = re.compile(r"(.*?)\.(\d+)\.")  # the first number in a name is that of a layer in its stack


def param_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices decay, vectors (norms, biases) do not; ``lr_share`` is what a group gets of the learning rate.

    Shapes are the unpartitioned ones.

    Raises:
        ConfigError: if nothing is trained, or ``layer_decay`` finds no layers.
    """
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    depths = _depths(model) if optim.layer_decay < 1 else {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            decay = optim.weight_decay if len(getattr(param, "ds_shape", param.shape)) >= 2 else 0.0
            depth = depths.get(name, 0)
            group = groups.setdefault(
                (-depth, -decay),
                {"params": [], "weight_decay": decay, "lr_share": optim.layer_decay**depth},
            )
            group["params"].append(param)
    if not groups:
        raise ConfigError(
            "the model has no parameter to train", where="model.freeze", remedy="freeze less"
        )
    return [groups[key] for key in sorted(groups)]


def _depths(model: nn.Module) -> dict[str, int]:
    """Return how many layers lie above each parameter's: 0 of the head, 1 of the last layer, the most of embeddings.

    Encoder and decoder are stacks of their own. What comes before the first stack, in the order of the model's modules, is an embedding.
    """
    layers = {
        name: (found[1], int(found[2]))
        for name, _ in model.named_parameters()
        if (found := LAYER.match(name))
    }
    if not layers:
        raise ConfigError(
            "this model has no numbered layers",
            where="optim.layer_decay",
            value=type(model).__name__,
            remedy="optim.layer_decay=1",
        )
    sizes = {
        stack: 1 + max(number for other, number in layers.values() if other == stack)
        for stack, _ in layers.values()
    }
    embeddings = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    depths, above = dict[str, int](), 1 + max(sizes.values())
    for name, _ in model.named_parameters():
        if name in layers:
            stack, number = layers[name]
            depths[name], above = sizes[stack] - number, 0
        else:
            depths[name] = 1 + max(sizes.values()) if name in embeddings else above
    return depths
