"""A checkpoint leaves as a transformers folder: safetensors in bounded memory, published only if the logits are equal.

Tensors are read one at a time through the weights reader and written shard by shard, so no more than one shard is held.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hfscale.checkpoint.weights import WeightsReader
from hfscale.errors import CheckpointError

SHARD_BYTES = 2 * 2**30


def write_weights(reader: WeightsReader, skeleton: PreTrainedModel, folder: Path, *, dtype: torch.dtype,
                  shard_bytes: int = SHARD_BYTES) -> None:
    """Write every tensor of ``skeleton`` (a model on the meta device) from ``reader`` into ``folder`` as safetensors.

    Tied tensors are written once, as transformers does.

    Raises:
        CheckpointError: if the reader lacks one of them, or has it in another shape.
    """
    shapes = untied_shapes(skeleton)
    wrong = [f"{name}: {have} instead of {list(shape)}" for name, shape in shapes.items()
             if (have := list(reader.shape(name)) if name in reader.names() else "missing") != list(shape)]
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors of the model are missing or misshapen", where=folder.name, value=wrong[:5],
                              remedy="the checkpoint belongs to another model; compare its config.yaml with the architecture")
    plan = list(_shards(shapes, bytes_per_item=torch.empty(0, dtype=dtype).element_size(), limit=shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, 1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        tensors = {name: reader.read(name).to(dtype).contiguous() for name in names}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps the system's
            raise CheckpointError(f"the weights cannot be written: {error}", where=folder.parent.parent,
                                  remedy="make room, or export to another disk; nothing was published") from error
        weight_map |= dict.fromkeys(names, file)
    if len(plan) > 1:
        size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def untied_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return name -> shape of every parameter and saved buffer, each storage once, under its first name."""
    seen: set[int] = set()
    shapes: dict[str, torch.Size] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name] = tensor.shape
    return shapes


def _shards(shapes: dict[str, torch.Size], *, bytes_per_item: int, limit: int) -> Iterator[list[str]]:
    """Yield the names of each shard: in order, up to ``limit`` bytes, at least one tensor."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        bytes_ = shape.numel() * bytes_per_item
        if names and size + bytes_ > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    yield names


def compare_logits(got: Tensor, want: Tensor, *, tolerance: float) -> float:
    """Return the relative L2 difference of two sets of logits.

    Raises:
        CheckpointError: above ``tolerance``, or where either is not finite.
    """
    difference = ((got.double() - want.double()).norm() / want.double().norm()).item()
    if not difference <= tolerance:  # also true of nan
        raise CheckpointError("the exported model does not give the run's logits; nothing was published", where="equal-logits gate",
                              value=f"relative difference {difference:.2e}, allowed {tolerance:.0e}",
                              remedy="this is a defect of the checkpoint or of the export: verify the checkpoint and report it")
    return difference
