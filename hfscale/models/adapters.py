"""LoRA adapters in a model, and every name that peft has for what belongs to them.

Low-rank adaptation: Hu et al. 2021 (arXiv 2106.09685). The modules are peft's; they are put into
the model in place, so its class and its other names stay, and a matrix ``X.weight`` becomes
``X.base_layer.weight`` beside ``X.lora_A.default.weight`` and ``X.lora_B.default.weight``. A folder
of peft's calls these ``base_model.model.X.lora_A.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from hfscale.config.schema import Lora
from hfscale.errors import ConfigError, nearest

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

# files of a folder of peft's
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(name: str) -> bool:
    """Return whether a parameter is one of an adapter's."""
    return ".lora_" in name


def without_adapter(name: str) -> str:
    """Return what a matrix is called where it has no adapter."""
    return name.replace(".base_layer.", ".")


def pair_of(module: str) -> tuple[str, str]:
    """Return the names of A and B of a module's adapter, in a model."""
    return f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"


def name_in_folder(name: str) -> str:
    """Return what a folder of peft's calls a parameter."""
    inside = name.replace(".default.", ".") if is_adapter(name) else name
    return f"base_model.model.{inside}"


def pairs(model: PreTrainedModel) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Yield each module that has an adapter by its name, with A and B."""
    for path, module in model.named_modules():
        for name in getattr(module, "lora_A", ()):
            yield path, [module.get_parameter(f"lora_{side}.{name}.weight") for side in "AB"]


def transposed(model: PreTrainedModel) -> dict[str, bool]:
    """Return the names of modules that have an adapter, and of each whether its weight is (inputs,
    outputs), GPT-2's way.
    """
    return {path: bool(model.get_submodule(path).fan_in_fan_out) for path, _ in pairs(model)}


def peft_config(lora: Lora, targets: Sequence[str], **more: object) -> LoraConfig:
    """Return what peft must know of adapters at the modules ``targets``."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=[*targets],
        **more,  # type: ignore[arg-type]
    )


def add_adapters(model: PreTrainedModel, lora: Lora) -> None:
    """Return with adapters beside the linear modules that ``lora`` asks for.

    Raises:
        ConfigError: if one of them is the end of no name.
    """
    from peft import inject_adapter_in_model

    chosen = _targets(model, lora.targets)
    conv1d = any(chosen.values())
    config = peft_config(lora, [*chosen], init_lora_weights=False, fan_in_fan_out=conv1d)
    inject_adapter_in_model(config, model)


def _targets(model: PreTrainedModel, asked: str | Sequence[str]) -> dict[str, bool]:
    """Return the linear modules that shall get adapters, and of each whether it is a Conv1D."""
    from transformers.pytorch_utils import Conv1D

    inside, output = set(model.base_model.modules()), model.get_output_embeddings()
    linear = {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    }
    if isinstance(asked, str):
        return {name: kind for name, kind in linear.items() if model.get_submodule(name) in inside}
    by_end = {end: [name for name in linear if f".{name}".endswith(f".{end}")] for end in asked}
    for number, end in enumerate(asked):
        if not by_end[end]:
            raise unknown_name(
                "no linear module has such a name", f"model.lora.targets.{number}", end, linear
            )
    return {name: linear[name] for names in by_end.values() for name in names}


def unknown_name(what: str, where: str, value: str, names: Collection[str]) -> ConfigError:
    """Return the error for a name, or a part of one, that none of ``names`` has."""
    words = {word for name in names for word in name.split(".") if not word.isdecimal()}
    near = nearest(re.sub(r"\W", "", value), words)
    return ConfigError(
        what,
        where=where,
        value=value,
        remedy=f"{near}; a whole name is {next(iter(names), 'none')}",
    )
