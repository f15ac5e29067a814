"""What an optimizer keeps beside a weight, by the names that checkpoints have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ADAMW = ("exp_avg", "exp_avg_sq")
LION = ("exp_avg",)
MOMENTUM = ("momentum_buffer",)


def kept(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], weight: Tensor
) -> dict[str, Tensor]:
    """Return a trained weight (fp32) of ``group`` and what is kept beside it, which is made here if
    no step has made it yet.
    """
    state, names = optimizer.state[weight], group["keeps"]
    if not state:
        if names == ADAMW:
            on = weight.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=on)
        for name in names:
            state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    return {"weight": weight.detach(), **{name: state[name] for name in names}}
