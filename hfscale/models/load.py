"""Pretrained weights into a built model, one parameter at a time, whole or partitioned.

Names in files differ from a model's by the base model's prefix (``transformer.wte.weight`` is saved as ``wte.weight`` by a
headless model), by ties (one of several names is saved) and by age (``gamma`` and ``beta`` of old LayerNorms).
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfscale.errors import CheckpointError
from hfscale.log import logger
from hfscale.models.init import Gather


class Reader(Protocol):
    """Weights by name, read one at a time (``checkpoint/weights.py``)."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Loaded:
    """What did not match. Missing parameters keep their first weights (a new head, say); unexpected ones were not read."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_weights(model: PreTrainedModel, reader: Reader, gather: Gather | None = None) -> Loaded:
    """Return what did not match, after every parameter and buffer that the reader has was copied into ``model``.

    Every rank calls it alike: parameters are gathered in turn, so that no rank holds more than one.

    Raises:
        CheckpointError: if nothing matches, or a shape differs.
    """
    available = set(reader.names())
    missing, used = [], set()
    for names, tensor in _tensors(model):
        found = [saved for name in names for saved in _spellings(name, model.base_model_prefix) if saved in available]
        used.update(found)
        if not found:
            missing += names[:1] if isinstance(tensor, torch.nn.Parameter) else []  # buffers have their constructor's value
            continue
        with gather([tensor]) if gather and isinstance(tensor, torch.nn.Parameter) else nullcontext():
            if tuple(tensor.shape) != tuple(reader.shape(found[0])):
                raise CheckpointError(
                    f"{names[0]} has another shape in the pretrained weights", where=found[0], value=tuple(reader.shape(found[0])),
                    remedy=f"this model needs {tuple(tensor.shape)}: take model.config from the pretrained model",
                )  # fmt: skip
            tensor.data.copy_(reader.read(found[0]))
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or ()) or r"(?!)"
    loaded = Loaded(tuple(missing), tuple(sorted(name for name in available - used if not re.search(ignored, name))))
    if not used:
        raise CheckpointError(
            "none of the pretrained weights fits this architecture", where=type(model).__name__, value=sorted(available)[:3],
            remedy="check model.pretrained and the objective: they must belong to one architecture",
        )  # fmt: skip
    if loaded.missing:
        logger.info(f"{len(loaded.missing)} parameters are not in the pretrained weights and start fresh: {_some(loaded.missing)}")
    if loaded.unexpected:
        logger.info(f"{len(loaded.unexpected)} pretrained weights have no place in this model: {_some(loaded.unexpected)}")
    return loaded


def _tensors(model: PreTrainedModel) -> Iterator[tuple[list[str], Tensor]]:
    """Yield each parameter and saved buffer once, with all its names (several where it is tied)."""
    saved = set(model.state_dict())  # without the buffers that a model computes
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, buffer in model.named_buffers():
        if name in saved:
            names[buffer] = [name]
    for tensor, aliases in names.items():
        yield aliases, tensor


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """Yield the names under which a file may hold the model's ``name``."""
    for spelled in dict.fromkeys([name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]):
        yield spelled
        yield spelled.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
