"""A few numbers of the live engine's output on fixed inputs, stored in each checkpoint: an export
must give the same.

The inputs are those that the objective names, whatever a model takes. Of what it gives, a number a
token or a label, two ends of an answer or hidden states, some numbers are kept. Legend: K numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hfscale.checkpoint import layout
from hfscale.errors import CheckpointError
from hfscale.models.call import call, live, probe_row, row_inputs

if TYPE_CHECKING:  # an export needs no DeepSpeed
    from hfscale.engine.engine import Engine

KEPT = 512  # numbers of each output, at most
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
INPUT = "input."  # before the name of an input in the file; a file of version 0.1 has just ``ids``


@dataclass(frozen=True)
class Probe:
    """What went in, by keyword, and what of the output is kept."""

    inputs: Mapping[str, Tensor]
    logits: Tensor = field(default_factory=lambda: torch.empty(0))  # (K), fp32

    def ask(self, model: Callable[..., object], *, device: torch.device) -> Tensor | None:
        """Return what the probe keeps of the output of ``model`` (bare, or an engine): (K), fp32,
        on the CPU.

        None: the model gives nothing that is known here.
        """
        inputs = self.inputs
        if "ids" in inputs:  # of version 0.1
            inputs = row_inputs(inputs["ids"], live(model).config)
        output = call(model, **{name: tensor.to(device) for name, tensor in inputs.items()})
        given = [getattr(output, name, None) for name in OUTPUTS]
        kept = [_spread(tensor.flatten()) for tensor in given if tensor is not None]
        return torch.cat(kept).cpu().float() if kept else None

    def to_bytes(self) -> bytes:
        named = {f"{INPUT}{name}": tensor.contiguous() for name, tensor in self.inputs.items()}
        return save({**named, "logits": self.logits})


def _spread(numbers: Tensor) -> Tensor:
    """Return up to ``KEPT`` of the numbers, evenly spread."""
    count = min(KEPT, len(numbers))
    return numbers[torch.linspace(0, len(numbers) - 1, count, dtype=torch.float64).long()]


def make_probe(engine: Engine, inputs: Mapping[str, Tensor] | None = None) -> Probe | None:
    """Return the engine's output on ``inputs``, by default a row of text. Collective.

    None for a model without a vocabulary, or with an output that is not known here.
    """
    inputs = inputs or probe_row(getattr(engine.module, "config", None))
    if inputs is None:
        return None
    empty = Probe({name: tensor.clone() for name, tensor in inputs.items()})  # none shares memory
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
    try:
        tensors = load_file(path)
        logits = tensors.pop("logits")
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(
            "the output to compare with is damaged", where=path, value=str(error).splitlines()[0]
        ) from None
    return Probe({name.removeprefix(INPUT): tensor for name, tensor in tensors.items()}, logits)
