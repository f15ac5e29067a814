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
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfscale.checkpoint.weights import Match, WeightsReader
from hfscale.engine.fragments import tied
from hfscale.errors import CheckpointError
from hfscale.hub import ModelConfig
from hfscale.log import logger
from hfscale.models.adapters import is_adapter, without_adapter
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
    return {int(number): str(name) for number, name in (read.id2label or {}).items()}


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
    parameters, saved = dict(model.named_parameters()), model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    tensors = parameters | buffers
    shapes = {
        name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()
    }
    available = reader.names()
    sources = _sources(model, list(tensors), set(available))
    rows = _ids(model, reader, tensors, shapes, sources)
    renamed = labels is not None and _renamed(labels, model.config.id2label)
    grown, wrong = list[str](), list[str]()
    for name, there in sources.items():
        if not there:
            continue
        have, want = tuple(reader.shape(there[0])), shapes[name]
        if have != want and rows[0] < rows[1] and want == _grow(have, rows):
            grown.append(name)
        elif _in_head(model, name, want) and (renamed or have[:1] != want[:1]):
            sources[name] = []  # it starts fresh
        elif have != want:
            wrong.append(f"{name}: {list(want)}, there {list(have)}")
        if _differ(reader, there):
            wrong.append(f"{name}: this model ties {' and '.join(there)}, which differ there")
    if wrong or not any(sources.values()):
        raise _no_match(model, wrong, available)
    used = {name for there in sources.values() for name in there}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unexpected = [
        name
        for name in available
        if name not in used and not any(re.search(pattern, name) for pattern in ignored)
    ]
    # buffers have their constructor's value
    missing = [name for name in parameters if not sources[name]]
    return Match(
        {name: there[0] for name, there in sources.items() if there},
        tuple(missing),
        tuple(sorted(unexpected)),
        tuple(grown),
        rows,
    )


def _sources(
    model: PreTrainedModel, names: Sequence[str], available: set[str]
) -> dict[str, list[str]]:
    """Return the names under which the files hold each of the model's tensors: none, or several
    that the model ties.
    """
    aliases = {name: [without_adapter(name)] for name in names}
    for alias, first in tied(model).items():
        if first in aliases:
            aliases[first].append(alias)
    prefix = model.base_model_prefix
    return {
        name: [
            there
            for alias in aliases[name]
            for there in _spellings(alias, prefix)
            if there in available
        ]
        for name in names
    }


def _ids(
    model: PreTrainedModel,
    reader: WeightsReader,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Sequence[str]],
) -> tuple[int, int]:
    """Return how many ids the embedding has there, and in the model; (0, 0): it is not there."""
    weight = model.get_input_embeddings().weight
    words = next(name for name, tensor in tensors.items() if tensor is weight)
    if not sources[words]:
        return 0, 0
    return reader.shape(sources[words][0])[0], shapes[words][0]


def _grow(shape: tuple[int, ...], rows: tuple[int, int]) -> tuple[int, ...]:
    """Return ``shape`` with a row for each of the new ids."""
    old, new = rows
    return tuple(new if size == old else size for size in shape)


def _in_head(model: PreTrainedModel, name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor has a row (or number) a label."""
    outside = not name.startswith(f"{model.base_model_prefix}.")
    return outside and shape[:1] == (model.config.num_labels,)


def _differ(reader: WeightsReader, names: Sequence[str]) -> bool:
    """Return whether what the model ties are unlike tensors in the files."""
    first, *others = names
    return any(
        reader.home(other) != reader.home(first)
        and not torch.equal(reader.read(other), reader.read(first))
        for other in others
    )


def _no_match(
    model: PreTrainedModel, wrong: Sequence[str], available: Sequence[str]
) -> CheckpointError:
    """Return the error to raise for weights that do not fit."""
    what = "none of the pretrained weights is one of the model's"
    if wrong:
        what = f"{len(wrong)} pretrained weights do not fit the model"
    return CheckpointError(
        what,
        where=f"model.pretrained, {type(model).__name__}",
        value=list(wrong[:NAMED]) or list(available[:3]),
        remedy="they must belong to one architecture: check model.pretrained, and what "
        "model.config changes in it",
    )


def _renamed(there: Mapping[int, str], here: Mapping[int, str] | Mapping[str, str] | None) -> bool:
    names = (*there.values(), *(here or {}).values())
    numbers = any(re.fullmatch(r"(LABEL_)?\d+", name) for name in names)  # which say nothing
    return bool(there) and there != here and not numbers


def tell(found: Match, model: PreTrainedModel) -> Match:
    """Return ``found``, after naming in the log what did not match, and what of it ``model`` will
    never train.
    """
    _say(
        [name for name in found.missing if not is_adapter(name)],
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
        old = spelled.replace("LayerNorm.weight", "LayerNorm.gamma")
        old = old.replace("LayerNorm.bias", "LayerNorm.beta")
        if old != spelled:
            yield old


def _say(names: Sequence[str], what: str) -> None:
    if names:
        logger.warning(
            f"{len(names)} {what}: "
            f"{', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"
        )
