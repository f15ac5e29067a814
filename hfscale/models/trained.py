"""Which parameters of a model are trained: all of them, all but frozen ones, or LoRA adapters
beside frozen matrices.

Low-rank adaptation: Hu et al. 2021 (arXiv 2106.09685). The modules are peft's; they are put into
the model in place, so its class and its other names stay, and a matrix ``X.weight`` becomes
``X.base_layer.weight`` beside ``X.lora_A`` and ``X.lora_B``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfscale.config.schema import Lora, Model
from hfscale.errors import ConfigError, nearest


def choose_trained(model: PreTrainedModel, wanted: Model) -> None:
    """Return with ``model.freeze`` or ``model.lora`` applied to ``model``, which may be partitioned
    or on the meta device.

    Raises:
        ConfigError: if a pattern or a target is found in no name.
    """
    if wanted.lora:
        _add_adapters(model, wanted.lora)
    names = dict(model.named_parameters(remove_duplicate=False))
    for number, pattern in enumerate(wanted.freeze):
        found = [name for name in names if pattern.search(name)]
        if not found:
            raise _unknown(
                "no parameter has such a name", f"model.freeze.{number}", pattern.pattern, names
            )
        for name in found:
            names[name].requires_grad_(False)


def _targets(model: PreTrainedModel, asked: str | Sequence[str]) -> dict[str, bool]:
    """Return the linear modules that shall get adapters, and of each whether it is a Conv1D."""
    inside, output = set(model.base_model.modules()), model.get_output_embeddings()
    linear = {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    }
    if isinstance(asked, str):
        return {name: kind for name, kind in linear.items() if model.get_submodule(name) in inside}
    found = {end: [name for name in linear if f".{name}".endswith(f".{end}")] for end in asked}
    for number, end in enumerate(asked):
        if not found[end]:
            raise _unknown(
                "no linear module has such a name", f"model.lora.targets.{number}", end, linear
            )
    return {name: linear[name] for names in found.values() for name in names}


def transposed(model: PreTrainedModel) -> dict[str, bool]:
    """Return the names of modules that have an adapter, and of each whether its weight is (inputs,
    outputs), GPT-2's way.
    """
    return {
        path: bool(module.fan_in_fan_out)
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def _add_adapters(model: PreTrainedModel, lora: Lora) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    chosen = _targets(model, lora.targets)
    inject_adapter_in_model(
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            init_lora_weights=False,
            target_modules=[*chosen],
            fan_in_fan_out=any(chosen.values()),
        ),
        model,
    )


def _unknown(what: str, where: str, value: str, names: Collection[str]) -> ConfigError:
    words = {word for name in names for word in name.split(".") if not word.isdecimal()}
    near = nearest(re.sub(r"\W", "", value), words)
    return ConfigError(
        what,
        where=where,
        value=value,
        remedy=f"{near}; a whole name is {next(iter(names), 'none')}",
    )
