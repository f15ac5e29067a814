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
    positions_P: Tensor
    columns_C: Tensor
    logits: Tensor  # (B, P, C), fp32

    def ask(self, model: Any, *, device: torch.device) -> Tensor | None:
        """Return what the probe keeps of the logits of ``model`` (with a ``config``, or an engine): (B, P, C), fp32, on the CPU.

        An encoder-decoder gets the tokens on both sides. None: the model has no logits for each token.
        """
        ids = self.ids_BT.to(device)
        both = {"decoder_input_ids": ids} if getattr(getattr(model, "module", model).config, "is_encoder_decoder", False) else {}
        logits = getattr(model(input_ids=ids, **both), "logits", None)
        return None if logits is None or logits.ndim != 3 else self.pick(logits).contiguous()

    def pick(self, logits_BTV: Tensor) -> Tensor:
        """Return the part of ``logits_BTV`` that the probe kept: (B, P, C), fp32, on the CPU."""
        return logits_BTV.cpu()[:, self.positions_P][..., self.columns_C].float()

    def to_bytes(self) -> bytes:
        return save({"ids": self.ids_BT, "positions": self.positions_P, "columns": self.columns_C, "logits": self.logits})


def make_probe(engine: Engine) -> Probe | None:
    """Return the engine's logits on the fixed tokens. Collective. None for a model without a vocabulary or logits of its own."""
    config = getattr(engine.module, "config", None)
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is None:
        return None
    tokens = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    ids = torch.randint(vocab_size, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(max(0, tokens - POSITIONS), tokens)
    columns = torch.linspace(0, vocab_size - 1, min(COLUMNS, vocab_size)).long()
    empty = Probe(ids, positions, columns, torch.empty(0))
    with engine.eval_mode():
        logits = empty.ask(engine, device=engine.device)
    return None if logits is None else replace(empty, logits=logits)


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
    return Probe(tensors["ids"], tensors["positions"], tensors["columns"], tensors["logits"])
