"""A few numbers of the live engine's output on fixed tokens, stored in each checkpoint: an export must give the same.

Whatever a model gives, a number a token or a label, two ends of an answer or hidden states, is laid out flat. Legend: T tokens, K numbers.
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

TOKENS, KEPT = 32, 512  # at most, of each output
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


@dataclass(frozen=True)
class Probe:
    """What went in, and what of the output is kept."""

    ids_1T: Tensor  # int64: one row, since some heads take several only with a padding token
    logits: Tensor  # (K), fp32

    def ask(self, model: Any, *, device: torch.device) -> Tensor | None:
        """Return what the probe keeps of the output of ``model`` (with a ``config``, or an engine): (K), fp32, on the CPU.

        An encoder-decoder gets the tokens on both sides. None: the model gives nothing that is known here.
        """
        ids = self.ids_1T.to(device)
        both = (
            {"decoder_input_ids": ids}
            if getattr(getattr(model, "module", model).config, "is_encoder_decoder", False)
            else {}
        )
        output = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), **both
        )  # without one transformers warns of padding
        flat = [
            found.flatten()
            for name in OUTPUTS
            if (found := getattr(output, name, None)) is not None
        ]
        spread = [
            numbers[
                torch.linspace(
                    0, len(numbers) - 1, min(KEPT, len(numbers)), dtype=torch.float64
                ).long()
            ]
            for numbers in flat
        ]
        return torch.cat(spread).cpu().float() if spread else None

    def to_bytes(self) -> bytes:
        return save({"ids": self.ids_1T, "logits": self.logits})


def make_probe(engine: Engine) -> Probe | None:
    """Return the engine's output on the fixed tokens. Collective. None for a model without a vocabulary or an output that is known here."""
    config = getattr(engine.module, "config", None)
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is None:
        return None
    tokens = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    ids = torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    if isinstance(end := getattr(config, "eos_token_id", None), int) and end < vocab_size:
        ids[:, -1] = end  # BART and T5 classify by its state
    empty = Probe(ids, torch.empty(0))
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
        raise CheckpointError(
            "this checkpoint has no output to compare with",
            where=path,
            remedy="export a checkpoint of a model that gives logits or hidden states",
        )
    tensors = load_file(path)
    return Probe(tensors["ids"], tensors["logits"])
