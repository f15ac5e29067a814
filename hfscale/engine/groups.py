"""What the optimizer does to each parameter: which decay, with which share of the learning rate,
and which are matrices that Muon makes orthogonal.

Decay pulls towards zero what multiplies inputs: matrices, convolutions, embeddings. What shifts,
scales or keeps time (norms, biases, states of a recurrence) is left alone, however many dimensions
it has.

Layer-wise learning-rate decay: Howard & Ruder 2018 (ULMFiT, "discriminative fine-tuning"); Clark et
al. 2020 (ELECTRA).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hfscale.config.schema import Optim
from hfscale.errors import ConfigError

NORM = re.compile(r"norm", re.IGNORECASE)  # in the name of a module's class
# in a parameter's own name: biases (of experts and heads, too), states of Mamba and RWKV, factors
# of layers
VECTOR = re.compile(
    r"(^|_)bias(_|$)|^(A_log|D|dt_bias)$|^time_(mix|decay|first|maa)"
    r"|(^|_)(scale|gamma|lambda\d?)(_|$)"
)
# in a name: norms and projections beside embeddings, as well
EMBEDDING = re.compile(r"emb", re.IGNORECASE)
# in a name: after all layers, wherever a class lists it
LAST = re.compile(r"(^|\.)(final_|ln_f|norm_f|project_out|lm_head)")
PRODUCTS = (nn.Linear, nn.Bilinear, nn.Embedding, Conv1D, nn.modules.conv._ConvNd)
LAYER = re.compile(r"(.*?)\.(\d+)\.")  # the first number in a name is that of a layer in its stack


def param_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """Return the optimizer's groups: ``weight_decay`` as ``decays`` says; ``lr_share`` is what a
    group gets of the learning rate; ``orthogonal``: matrices for Muon.

    Raises:
        ConfigError: if nothing is trained, or ``layer_decay`` finds no layers.
    """
    groups: dict[tuple[int, float, bool], dict[str, Any]] = {}
    depths = _depths(model) if optim.layer_decay < 1 else {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            owner = model.get_submodule(name.rpartition(".")[0])
            decay = optim.weight_decay if decays(owner, name, param) else 0.0
            depth = depths.get(name, 0)
            matrix = optim.name == "muon" and hidden_matrix(owner, name, param)
            group = groups.setdefault(
                (-depth, -decay, matrix),
                {
                    "params": [],
                    "weight_decay": decay,
                    "lr_share": optim.layer_decay**depth,
                    "orthogonal": matrix,
                },
            )
            group["params"].append(param)
    if not groups:
        raise ConfigError(
            "the model has no parameter to train", where="model.freeze", remedy="freeze less"
        )
    return [groups[key] for key in sorted(groups)]


def decays(owner: nn.Module, name: str, param: nn.Parameter) -> bool:
    """Return whether weight decay is for ``param``, which is ``owner``'s own, by what it is. Shapes
    are the unpartitioned ones.
    """
    shape = getattr(param, "ds_shape", param.shape)
    if len(shape) < 2 or getattr(param, "_no_weight_decay", False):
        return False
    norm = NORM.search(type(owner).__name__) and not isinstance(owner, nn.Embedding)
    if norm or VECTOR.search(name.rpartition(".")[2]):
        return False
    # a matrix with one row (the head of a regression) is a matrix; a parameter by itself of (1, 1,
    # H) is a vector
    return isinstance(owner, PRODUCTS) or sum(size > 1 for size in shape) >= 2


def hidden_matrix(owner: nn.Module, name: str, param: nn.Parameter) -> bool:
    """Return whether ``param`` multiplies the states between a model's numbered layers: no
    embedding, no head, no convolution.
    """
    if not LAYER.match(name) or not decays(owner, name, param):
        return False
    return not isinstance(owner, (nn.Embedding, nn.modules.conv._ConvNd))


def layer_names(model: nn.Module) -> dict[str, str]:
    """Return what people call the part of the model that each parameter is in: ``layers.0``,
    ``embeddings``, ``head``; ``encoder.0`` and ``decoder.0`` where there are several stacks.
    """
    names = [name for name, _ in model.named_parameters()]
    layers = {name: match for name in names if (match := LAYER.match(name))}
    if not layers:
        return dict.fromkeys(names, "model")
    stacks = {match[1]: match[1].split(".") for match in layers.values()}
    common = set.intersection(*map(set, stacks.values()))
    short = {
        stack: ".".join(part for part in parts if part not in common) or "layers"
        for stack, parts in stacks.items()
    }
    depths = _depths(model)
    others = {name: "embeddings" if depths[name] else "head" for name in names}
    return others | {name: f"{short[match[1]]}.{match[2]}" for name, match in layers.items()}


def _depths(model: nn.Module) -> dict[str, int]:
    """Return how many layers lie above each parameter's: 0 of the head, 1 of the last layer, the
    most of embeddings.

    Encoder and decoder are stacks of their own. What has no number is an embedding or comes last if
    its name or its module says so; else by its place: what a class lists before its first stack is
    an embedding.
    """
    layers = {
        name: (match[1], int(match[2]))
        for name, _ in model.named_parameters()
        if (match := LAYER.match(name))
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
    lowest = 1 + max(sizes.values())
    embeddings = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = set(output.parameters()) if isinstance(output, nn.Module) else set()
    depths, above = dict[str, int](), lowest
    for name, param in model.named_parameters():
        if name in layers:
            stack, number = layers[name]
            depths[name], above = sizes[stack] - number, 0
        elif name in embeddings:
            depths[name] = lowest
        elif param in heads or LAST.search(name):
            depths[name] = 0
        else:
            depths[name] = lowest if EMBEDDING.search(name) else above
    return depths
