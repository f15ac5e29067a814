"""A checkpoint leaves as a transformers folder: safetensors in bounded memory, published only if
the logits are equal.

Tensors are read, cast and written block by block: no more than one block is held, however large a
tensor or the model is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel

from hfscale.checkpoint.manifest import write_file
from hfscale.checkpoint.store import pack
from hfscale.checkpoint.weights import WeightsReader
from hfscale.engine.fragments import tied
from hfscale.errors import CheckpointError

SHARD_BYTES = 2 * 2**30
BLOCK = 2**20  # elements


def write_weights(
    reader: WeightsReader,
    skeleton: PreTrainedModel,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write every tensor of ``skeleton`` (a model on the meta device) from ``reader`` into
    ``folder``, in the skeleton's precision.

    Tied tensors are written once, as transformers does, and files are cut as it cuts them.

    Raises:
        CheckpointError: if the reader lacks one of them, has it in another shape (an empty one,
            say), or does not tie what is tied.
    """
    tensors, available = untied(skeleton), set(reader.names())
    wrong = [
        f"{name}: {have} instead of {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if (have := list(reader.shape(name)) if name in available else "missing")
        != list(tensor.shape)
    ]
    wrong += [
        f"{name}: the model ties it to {first}, the checkpoint does not"
        for name, first in tied(skeleton).items()
        if name in available and reader.home(name) != reader.home(first)
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors of the model are missing, misshapen or tied by mistake; "
            "nothing was published",
            where="weights of the checkpoint",
            value=wrong[:5],
            remedy="the checkpoint belongs to another model; compare its config.yaml with the "
            "architecture",
        )
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)

    def blocks(name: str) -> Iterator[Tensor]:
        numel = tensors[name].numel()
        for start in range(0, numel, BLOCK):
            yield reader.read_slice(name, start=start, numel=min(BLOCK, numel - start)).to(
                tensors[name].dtype
            )

    for file, names in plan.filename_to_tensors.items():
        write_file(
            folder,
            file,
            pack(
                {name: (tensors[name].dtype, tensors[name].shape) for name in names},
                (block for name in names for block in blocks(name)),
            ),
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return every parameter and saved buffer by name, each once, under its first name."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {
        name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name
    }


def compare_logits(got: Tensor, want: Tensor, *, tolerance: float) -> float:
    """Return the relative L2 difference of two sets of logits.

    Raises:
        CheckpointError: above ``tolerance``, or where either is not finite.
    """
    difference: float = ((got.double() - want.double()).norm() / want.double().norm()).item()
    if not difference <= tolerance:  # also true of nan
        raise CheckpointError(
            "the exported model does not give the run's logits; nothing was published",
            where="equal-logits gate",
            value=f"relative difference {difference:.2e}, allowed {tolerance:.0e}",
            remedy="this is a defect of the checkpoint or of the export: verify the checkpoint "
            "and report it",
        )
    return difference
