"""Muon (Jordan et al. 2024): a hidden matrix moves by its momentum made orthogonal, all other
weights as under AdamW. ZeRO cuts matrices into ranges, so for the time of an update each is put
together on one rank (``matrices.py``); that rank alone does the arithmetic.

    M  = momentum M + G
    O  = orthogonal(G + momentum M)               Nesterov
    W -= lr (0.2 sqrt(max(rows, columns)) O + weight_decay W)

The factor makes an update as large as AdamW's usually is, so that learning rate and decay carry
over (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4).

Shape legend: A x B a matrix; E experts, whose matrices are one parameter (E, A, B).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hfscale.engine.kept import kept
from hfscale.engine.matrices import Matrices

# of the polynomial x -> a x + b x^3 + c x^5, whose iterates bring singular values near 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
LIKE_ADAMW = 0.2  # the usual root mean square of AdamW's update


class Muon(torch.optim.AdamW):
    """AdamW, but for groups that are ``orthogonal``. ``matrices`` must be set before the first
    update with a learning rate: an update is collective.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.momentum = momentum
        self.matrices: Matrices | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights that have a gradient."""
        groups = self.param_groups
        for group in groups:
            if group["orthogonal"]:
                self._move(group)
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _move(self, group: dict[str, Any]) -> None:
        flats = [flat for flat in group["params"] if flat.grad is not None]
        if not flats:
            return
        assert self.matrices is not None, "the engine tells where matrices lie"
        updates = []
        for flat in flats:
            momentum = kept(self, group, flat)["momentum_buffer"]
            momentum.mul_(self.momentum).add_(flat.grad)
            updates.append(flat.grad.add(momentum, alpha=self.momentum))
        self.matrices.replace(flats, updates, by=update_of)
        lr, decay = group["lr"], group["weight_decay"]
        for flat, update in zip(flats, updates, strict=True):
            flat.mul_(1 - lr * decay).add_(update, alpha=-lr)


def update_of(momentum: Tensor) -> Tensor:
    """Return (..., A, B) orthogonal and as large as an update of AdamW."""
    rows, columns = momentum.shape[-2:]
    return orthogonal(momentum) * (LIKE_ADAMW * math.sqrt(max(rows, columns)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrix to each (..., A, B), roughly: singular values come
    out between 0.7 and 1.2. By Newton-Schulz iterations, in bf16 on a GPU.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    if tall:
        x = x.mT
    return x.to(matrix.dtype)
