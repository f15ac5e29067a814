"""What a model's weights are: how many by part, which are trained, which DeepSpeed keeps whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from hfscale.models.adapters import is_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# a part by the path of a weight and the class of its module: the first that matches
PARTS = (
    ("adapters", None),
    ("embeddings", re.compile(r"emb|wte|wpe|shared", re.IGNORECASE)),
    ("head", re.compile(r"lm_head|(^|\.)(cls|score|classifier|qa_outputs|decoder)\.(?!.*\.\d+\.)")),
    ("experts", re.compile(r"experts\.")),
    ("router", re.compile(r"(router|gate)\.weight$")),
    ("norms", re.compile(r"norm|ln_", re.IGNORECASE)),
    ("attention", re.compile(r"att|SelfAttention|EncDecAttention", re.IGNORECASE)),
)
REST = "feed-forward and other"


@dataclass(frozen=True)
class Weights:
    """How many there are. ``persistent`` are those of parameters that stage 3 never cuts."""

    trained: int
    frozen: int
    tensors: int  # parameters that they are in
    largest: int  # of one parameter
    persistent: int
    buffer_bytes: int
    parts: dict[str, int]
    adapted: bool  # LoRA: the frozen ones are kept where they came from


def weights_of(model: PreTrainedModel, *, whole_below: float) -> Weights:
    """Return the weights of ``model``, which may be on the meta device; each is counted once.

    ``whole_below`` is DeepSpeed's ``stage3_param_persistence_threshold``.
    """
    parts, trained, frozen, tensors, largest, persistent = dict[str, int](), 0, 0, 0, 0, 0
    adapted = False
    for name, weight in model.named_parameters():
        number = weight.numel()
        part = _part(name, model.get_submodule(name.rpartition(".")[0]))
        parts[part] = parts.get(part, 0) + number
        adapted = adapted or is_adapter(name)
        tensors += 1
        largest = max(largest, number)
        persistent += number if number <= whole_below else 0
        if weight.requires_grad:
            trained += number
        else:
            frozen += number
    held = sum(one.numel() * one.element_size() for one in model.buffers())
    order = sorted(parts, key=lambda part: -parts[part])
    return Weights(
        trained=trained,
        frozen=frozen,
        tensors=tensors,
        largest=largest,
        persistent=persistent,
        buffer_bytes=held,
        parts={one: parts[one] for one in order},
        adapted=adapted,
    )


def _part(name: str, module: nn.Module) -> str:
    if is_adapter(name):
        return "adapters"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in type(module).__name__.lower():
        return "norms"
    for part, pattern in PARTS:
        if pattern is not None and pattern.search(name):
            return part
    return REST
