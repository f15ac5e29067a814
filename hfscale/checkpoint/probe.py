"""A few of the live engine's logits on fixed tokens, stored in each checkpoint: an export must give the same.

Legend: B rows, T tokens, V vocabulary; P positions and C columns of V are kept.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hfscale.checkpoint import layout
from hfscale.errors import CheckpointError

if TYPE_CHECKING:  # an export needs no DeepSpeed
    from hfscale.engine.engine import Engine

ROWS, TOKENS, POSITIONS, COLUMNS = 2, 16, 4, 64


@dataclass(frozen=True)
class Probe:
    """What went in, and what of the logits came out."""

    ids_BT: Tensor  # int64
    columns_C: Tensor
    logits: Tensor  # (B, P, C), fp32

    def pick(self, logits_BTV: Tensor) -> Tensor:
        """Return the part of ``logits_BTV`` that the probe kept: (B, P, C), fp32, on the CPU."""
        return logits_BTV[:, -POSITIONS:].float().cpu()[..., self.columns_C].contiguous()

    def to_bytes(self) -> bytes:
        return save({"ids": self.ids_BT, "columns": self.columns_C, "logits": self.logits})


def respond(model: Any, ids_BT: Tensor, *, encoder_decoder: bool) -> Tensor:
    """Return what a model, or the engine around it, says first of the tokens: logits, or a headless model's states: (B, T or 1, V)."""
    more = {"decoder_input_ids": ids_BT} if encoder_decoder else {}
    first = model(input_ids=ids_BT, **more)[0]
    return first if first.ndim == 3 else first[:, None]


def make_probe(engine: Engine) -> Probe | None:
    """Return the engine's logits on the fixed tokens. Collective. None for a model without a vocabulary."""
    config = engine.module.config
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is None:
        return None
    tokens = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    ids = torch.randint(vocab_size, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
    with engine.eval_mode():
        said = respond(engine, ids.to(engine.device), encoder_decoder=config.is_encoder_decoder)
    empty = Probe(ids, torch.linspace(0, said.shape[-1] - 1, min(COLUMNS, said.shape[-1])).long(), torch.empty(0))
    return replace(empty, logits=empty.pick(said))


def read_probe(checkpoint: Path) -> Probe:
    """Return the probe of a checkpoint.

    Raises:
        CheckpointError: if it has none.
    """
    path = checkpoint / layout.PROBE
    if not path.is_file():
        raise CheckpointError("this checkpoint has no logits to compare with", where=path,
                              remedy="export a checkpoint of a model that gives logits")
    tensors = load_file(path)
    return Probe(tensors["ids"], tensors["columns"], tensors["logits"])
