"""A run of LoRA adapters: the weights that they stand beside, and its export as peft's own
folder.
"""

from __future__ import annotations

import shlex
import warnings
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from hfscale.checkpoint import layout
from hfscale.checkpoint.weights import MergedWeights
from hfscale.errors import ConfigError, literal, shown
from hfscale.models.adapters import (
    ADAPTER_WEIGHTS,
    name_in_folder,
    pair_of,
    peft_config,
)
from hfscale.run.model import RunModel
from hfscale.tasks.base import Task

if TYPE_CHECKING:
    from peft import PeftModel


def write_adapter(source: RunModel, folder: Path) -> None:
    """Write what a run trained as ``PeftModel.from_pretrained`` reads it; modules that were trained
    whole go along whole.

    Raises:
        ConfigError: if it is no run of adapters.
    """
    reader, lora = source.weights, source.run.model.lora
    if lora is None or not isinstance(reader, MergedWeights):
        raise ConfigError(
            "this run has no adapters",
            where=source.checkpoint,
            remedy="export it without --adapter",
        )
    buffers = dict(source.skeleton.named_buffers())
    whole = {name: name.rpartition(".")[0] for name in reader.own if name not in buffers}
    chosen = [module for module in reader.targets if module not in whole.values()]
    peft_config(
        lora,
        chosen,
        modules_to_save=sorted(set(whole.values())) or None,
        fan_in_fan_out=any(reader.targets.values()),
        inference_mode=True,
        task_type=source.purpose.peft if source.purpose else None,
        base_model_name_or_path=lora_base(source),
    ).save_pretrained(str(folder))
    tensors = {name: reader.read(name) for name in whole} | {
        name: reader.saved.read(name) for module in chosen for name in pair_of(module)
    }
    save_file(
        {name_in_folder(name): tensor.contiguous() for name, tensor in tensors.items()},
        folder / ADAPTER_WEIGHTS,
    )


def load_adapter(source: RunModel, folder: Path) -> PeftModel:
    """Return the run's base with the adapter of ``folder``, as peft puts them together."""
    from peft import PeftModel

    base = copy(source.weights)
    assert isinstance(base, MergedWeights), "a run with adapters"
    base.targets = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name of old
        return PeftModel.from_pretrained(source.engine(reader=base).module, str(folder))


def lora_base(source: RunModel) -> str:
    """Return the base as the user said it: a name of the hub, not where this machine keeps it; or
    the path of its weights.
    """
    said, reader = source.run.model.pretrained, source.weights
    assert said is not None and isinstance(reader, MergedWeights)
    return reader.folder if Path(said).is_absolute() else said


def use_adapter(source: RunModel, folder: Path | str) -> str:
    """Return lines of Python that use an adapter. Its base may have to be exported first."""
    kind, base = source.kind, lora_base(source)
    export = f"# first: hfscale export {shown(shlex.quote(base))} BASE\n"
    first = export if (Path(base) / layout.MANIFEST).is_file() else ""
    needs = source.trained.model_overrides() if isinstance(source.trained, Task) else {}
    said = "".join(
        f", {key}={value!r}"
        for key, value in {**needs, **source.run.model.config}.items()
        if key.isidentifier()
    )
    return f"""{first}from peft import PeftModel
from transformers import {kind}
base = {kind}.from_pretrained({literal("BASE" if first else base)}{said})
model = PeftModel.from_pretrained(base, {literal(folder)})"""
