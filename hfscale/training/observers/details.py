"""What only pictures need of a watched step: norms by layer, phases and memory of all ranks, what
the rows hold. Two small collectives a watched step, none on others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfscale.dist.agree import numbers_of_ranks, sum_over_ranks
from hfscale.engine.engine import Engine
from hfscale.monitor.heartbeat import beat
from hfscale.monitor.phases import PHASES, START
from hfscale.monitor.throughput import Throughput, memory_now_gib
from hfscale.training.accounting import DOCUMENTS, POSITIONS, ROWS, TOKENS
from hfscale.training.observers.base import Observer, Step

# of a step, in the order in which their seconds are gathered
SHOWN = ("data", "forward", "backward", "step", "collective", "validation", "save")
COMPUTING = ("forward", "backward", "step")
BESIDE = ("data", "collective", "validation", "save", "observe")


@dataclass
class Details(Observer):
    """Puts them into the step's details. ``clip_norm`` is ``optim.clip_norm``, 0: off."""

    engine: Engine
    throughput: Throughput
    clip_norm: float
    _steps: int = 0  # since the last watched one, with it
    _clipped: int = 0
    _seconds: Mapping[str, float] = field(default_factory=PHASES.seconds)

    def look(self, step: Step) -> None:
        """Count the step; add what is measured, if it is watched."""
        self._steps += 1
        self._clipped += step.stats.grad_norm > self.clip_norm > 0
        if not step.watched:
            return
        beat("collective")
        if step.stats.updated:
            sums = sum_over_ranks(self.engine.layer_sums())
            step.details.update(by_layer(sums, self.engine.layers, norm=step.stats.grad_norm))
        if self.clip_norm:
            step.details["optim/clipped_share"] = self._clipped / self._steps
        if (scale := self.engine.loss_scale) is not None:
            step.details["optim/loss_scale"] = scale
        flops = step.figures["tokens_per_s"] * self.throughput.flops_per_token
        step.details["speed/tflops"] = flops / self.engine.all.size / 1e12
        step.details.update(of_rows(step.agreed.counts))
        step.details.update(self._of_ranks())
        step.details.update(shares(self._seconds))
        self._steps = self._clipped = 0
        beat("observe")

    def _of_ranks(self) -> dict[str, float]:
        """Return phases since the last watched step, and memory, over all ranks. Collective."""
        seconds = PHASES.seconds()
        spent = [seconds.get(name, 0.0) - self._seconds.get(name, 0.0) for name in SHOWN]
        self._seconds = seconds
        mine = [*(phase_s / self._steps for phase_s in spent), *memory_now_gib(self.engine.device)]
        ranks_WN = numbers_of_ranks(torch.tensor(mine, dtype=torch.float64))
        middle = ranks_WN.median(dim=0).values.tolist()
        most = ranks_WN.max(dim=0).values.tolist()
        allocated, reserved, host = most[len(SHOWN) :]
        details = {"memory/host": host}
        if self.engine.device.type == "cuda":
            details |= {"memory/allocated": allocated, "memory/reserved": reserved}
        for n, name in enumerate(SHOWN):
            if most[n]:
                details |= {f"time/p50/{name}": middle[n], f"time/max/{name}": most[n]}
        return details


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return which part of an attempt went where, by tag; ``seconds`` are by phase since it began.
    What it lost to other attempts `hfscale goodput` tells.
    """
    whole = sum(seconds.values())
    parts = {"compute": sum(seconds.get(name, 0.0) for name in COMPUTING)}
    parts["start"] = sum(spent for name, spent in seconds.items() if name.startswith(START))
    parts |= {name: spent for name, spent in seconds.items() if name in BESIDE}
    return {f"goodput/{name}": spent / whole for name, spent in parts.items()}


def by_layer(sums: Tensor, layers: list[str], *, norm: float) -> dict[str, float]:
    """Return norms of the gradient and update-to-weight ratios, by tag.

    ``sums`` (3, G) are squares of gradient, update and weights, over all ranks; the gradient's are
    of what was clipped, and ``norm`` is the whole one's before that.
    """
    gradient_G, update_G, weight_G = sums.double().tolist()
    total = sum(gradient_G)
    details = {}
    for name, gradient, update, weight in zip(layers, gradient_G, update_G, weight_G, strict=True):
        if total:
            details[f"optim/grad_norm/{name}"] = norm * (gradient / total) ** 0.5
        if weight:
            details[f"optim/update_ratio/{name}"] = (update / weight) ** 0.5
    return details


def of_rows(counts: Mapping[str, int]) -> dict[str, float]:
    """Return what the rows of a step hold, by tag."""
    details = {}
    if counts[POSITIONS]:
        details["data/padding_share"] = 1 - counts[TOKENS] / counts[POSITIONS]
    if counts[ROWS]:
        details["data/documents_a_row"] = counts[DOCUMENTS] / counts[ROWS]
    return details
