"""How a model is called, in this one place: training, probes, validation, prediction and the
export's proof all ask alike.

Without its cache of past keys and states: nothing here reads it, some architectures fail while they
fill it (bamba, xlstm), and a model that answers otherwise with a cache than without would be
compared with something that was never trained. ``generate`` keeps its own cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PROBE_TOKENS = 32  # at most
# the engine, or a bare model: called with keywords, returns an output with ``.logits``, say
Model = Callable[..., Any]


def call(model: Model, **inputs: object) -> Any:
    """Return the output of ``model``, an engine or a bare transformers model, for ``inputs`` by
    keyword.
    """
    if _has_cache(type(live(model)).forward):
        inputs["use_cache"] = False
    return model(**inputs)


def live(model: Model) -> Any:
    """Return the transformers model in an engine, or ``model`` itself. To look at, never to call:
    see ``Engine.module``.
    """
    return getattr(model, "module", model)


@lru_cache
def _has_cache(forward: Callable[..., object]) -> bool:
    """Return whether a forward takes ``use_cache``, by name or among the keywords that it hands
    on.
    """
    parameters = inspect.signature(forward).parameters.values()
    return any(one.name == "use_cache" or one.kind is one.VAR_KEYWORD for one in parameters)


def probe_row(config: PretrainedConfig | None) -> dict[str, Tensor] | None:
    """Return fixed inputs that a text model takes: one row (1, T) of random ids, of an
    encoder-decoder on both sides.

    None for a model without a vocabulary. One row, since some heads take several only with a
    padding token.
    """
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is None:
        return None
    positions = getattr(config, "max_position_embeddings", None) or 0
    tokens = min(PROBE_TOKENS, positions) if positions > 0 else PROBE_TOKENS  # XLNet says -1
    ids_1T = torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and end < vocab_size:
        ids_1T[:, -1] = end  # BART and T5 classify by its state
    return row_inputs(ids_1T, config)


def row_inputs(ids_1T: Tensor, config: PretrainedConfig | None) -> dict[str, Tensor]:
    """Return the inputs of a model that reads ``ids_1T``; without a mask transformers warns of
    padding.
    """
    inputs = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids_1T
    return inputs
