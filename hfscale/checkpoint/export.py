"""A checkpoint leaves as a transformers folder: safetensors in bounded memory, published only if the logits are equal.

Tensors are read one at a time through the weights reader and written shard by shard, so no more than one shard is held.
"""
from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
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
    plan = split_torch_state_dict_into_shards({name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()},
                                              filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: reader.read(name).to(dtype).contiguous() for name in names}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps the system's
            raise CheckpointError(f"the weights cannot be written: {error}", where=folder.parent.parent,
                                  remedy="make room, or export to another disk; nothing was published") from error
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def untied_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return name -> shape of every parameter and saved buffer, each storage once, under its first name."""
    names: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return {name: tensor.shape for tensor, name in names.items()}


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
