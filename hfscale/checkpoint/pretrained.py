"""Weights of another run, checkpoint, export or transformers folder into an engine, before its
first step.

Each rank reads the ranges that it holds, at any ZeRO stage, one after the other: no rank ever has
more than its share and the largest of these ranges. Names in files differ from a model's by the
base model's prefix (``transformer.wte.weight`` is saved as ``wte.weight`` by a headless model), by
ties (one of several names is saved) and by age (``gamma`` and ``beta`` of old LayerNorms).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hfscale.checkpoint.weights import BASE, Match, WeightsReader
from hfscale.engine.fragments import tied
from hfscale.errors import CheckpointError
from hfscale.hub import ModelConfig
from hfscale.log import logger
from hfscale.records import load

if TYPE_CHECKING:  # a login node matches names without DeepSpeed
    from hfscale.engine.engine import Engine
    from hfscale.engine.inference import InferenceEngine

NAMED = 20  # tensors that a message names


def labels_of(folder: Path) -> dict[int, str]:
    """Return what the outputs of the model in ``folder`` are called; nothing, where it does not
    say.
    """
    read = load(folder / "config.json", ModelConfig, what="the model's config")
    return {int(number): name for number, name in (read.id2label or {}).items()}


def match(
    model: PreTrainedModel, reader: WeightsReader, *, labels: Mapping[int, str] | None = None
) -> Match:
    """Return what fills ``model``, whose tensors may be partitioned or on the meta device.

    The head is left out where it has another number of outputs there, or other ``labels``, if both
    have names and not numbers.

    Raises:
        CheckpointError: if nothing matches, shapes differ by more than new ids, or what is one
            tensor here are two there.
    """
    parameters, saved, available = (
        dict(model.named_parameters()),
        model.state_dict(),
        reader.names(),
    )
    tensors = parameters | {name: buffer for name, buffer in model.named_buffers() if name in saved}
    shapes = {
        name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()
    }
    names = {
        name: [
            name.replace(BASE, "."),
            *(alias for alias, first in tied(model).items() if first == name),
        ]
        for name in tensors
    }
    found = {
        name: [
            there
            for alias in names[name]
            for there in _spellings(alias, model.base_model_prefix)
            if there in available
        ]
        for name in tensors
    }
    words = next(
        name for name, tensor in tensors.items() if tensor is model.get_input_embeddings().weight
    )
    rows = (reader.shape(found[words][0])[0], shapes[words][0]) if found[words] else (0, 0)
    renamed, grown, wrong = labels is not None and _renamed(labels, model.config.id2label), [], []
    for name, (first, *others) in ((name, there) for name, there in found.items() if there):
        have, want = tuple(reader.shape(first)), shapes[name]
        head = want[:1] == (model.config.num_labels,) and not name.startswith(
            f"{model.base_model_prefix}."
        )
        if (
            have != want
            and rows[0] < rows[1]
            and want == tuple(rows[1] if size == rows[0] else size for size in have)
        ):
            grown.append(name)
        elif head and (renamed or have[:1] != want[:1]):
            found[name] = []  # it starts fresh
        elif have != want:
            wrong.append(f"{name}: {list(want)}, there {list(have)}")
        if any(
            reader.home(other) != reader.home(first)
            and not torch.equal(reader.read(other), reader.read(first))
            for other in others
        ):
            wrong.append(
                f"{name}: this model ties {' and '.join([first, *others])}, which differ there"
            )
    if wrong or not any(found.values()):
        what = (
            f"{len(wrong)} pretrained weights do not fit the model"
            if wrong
            else "none of the pretrained weights is one of the model's"
        )
        raise CheckpointError(
            what,
            where=f"model.pretrained, {type(model).__name__}",
            value=wrong[:NAMED] or available[:3],
            remedy="they must belong to one architecture: check model.pretrained, and what "
            "model.config changes in it",
        )
    used, ignored = (
        {there for all_ in found.values() for there in all_},
        model._keys_to_ignore_on_load_unexpected or (),
    )
    unexpected = [
        name
        for name in available
        if name not in used and not any(re.search(pattern, name) for pattern in ignored)
    ]
    missing = [
        name for name in parameters if not found[name]
    ]  # buffers have their constructor's value
    return Match(
        {name: there[0] for name, there in found.items() if there},
        tuple(missing),
        tuple(sorted(unexpected)),
        tuple(grown),
        rows,
    )


def _renamed(there: Mapping[int, str], here: Any) -> bool:
    numbers = any(
        re.fullmatch(r"(LABEL_)?\d+", name) for name in (*there.values(), *here.values())
    )  # which say nothing
    return bool(there) and there != here and not numbers


def tell(found: Match, model: PreTrainedModel) -> Match:
    """Return ``found``, after naming in the log what did not match, and what of it ``model`` will
    never train.
    """
    _say(
        [name for name in found.missing if ".lora_" not in name],
        "parameters of the model are not among the pretrained weights and start fresh",
    )
    _say(found.unexpected, "pretrained weights have no place in the model and are not read")
    _say(
        found.grown,
        "tensors grow from {} to {} ids; each new one starts as the mean of the old ones".format(
            *found.rows
        ),
    )
    parameters = dict(model.named_parameters())
    _say(
        [name for name in found.grown if name in parameters and not parameters[name].requires_grad],
        f"tensors with new ids are frozen, so these {found.rows[1] - found.rows[0]} tokens "
        "keep the mean and are never learned "
        "(train them without model.lora and model.freeze first, or use tokens that the base knows)",
    )
    return found


@torch.no_grad()
def load_pretrained(engine: Engine | InferenceEngine, reader: WeightsReader, found: Match) -> None:
    """Return when each rank has filled its part of the weights with what was ``found``.
    Collective.
    """
    for fragment in engine.fragments(owned=False):
        if fragment.name in found.sources:
            fragment.tensors["weight"].copy_(
                found.read_slice(reader, fragment.name, start=fragment.start, numel=fragment.numel)
            )
    engine.after_load()


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """Yield the names under which a file may hold the model's ``name``."""
    for spelled in dict.fromkeys([name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]):
        yield spelled
        if spelled != (
            old := spelled.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
        ):
            yield old


def _say(names: Sequence[str], what: str) -> None:
    if names:
        logger.warning(
            f"{len(names)} {what}: "
            f"{', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"
        )
