"""What each rank computes with should be the same where it is not partitioned: a number that tells.

A bit that flipped in one rank's memory changes every gradient from then on, and no loss says so.
"""

from __future__ import annotations

import torch
from torch import nn

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # by bytes of an element


@torch.no_grad()
def digest(module: nn.Module) -> int:
    """Return the sum, modulo 2^64, of all bits of the parameters, each parameter's with a factor
    of its own. One flipped bit changes it; one wait for a GPU.
    """
    total: torch.Tensor | None = None
    for number, param in enumerate(module.parameters()):
        words = param.detach().reshape(-1).view(WORDS[param.element_size()])
        part = words.sum(dtype=torch.int64) * (2 * number + 1)
        total = part if total is None else total + part.to(total.device)
    return 0 if total is None else int(total)
