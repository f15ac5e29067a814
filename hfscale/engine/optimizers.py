"""The optimizers of ``optim.name``, and what each keeps beside a weight.

All but Muon change every element by itself, so that ZeRO's flat partitions, cut anywhere, give what
one process gives. One that looks at a parameter's shape does not (Adafactor: 4e-3 off, without a
word), nor one that counts steps a group (schedule-free, at stage 3): neither is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfscale.config.schema import Optim
from hfscale.engine.groups import param_groups
from hfscale.engine.kept import ADAMW, LION, MOMENTUM, kept
from hfscale.engine.muon import Muon
from hfscale.errors import ConfigError

FP32_BYTES = 4


class Lion(torch.optim.Optimizer):
    """The sign of a momentum (Chen et al. 2023, "Symbolic discovery of optimization algorithms",
    algorithm 2).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            lr, (quick, slow) = group["lr"], group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = kept(self, group, weight)["exp_avg"]
                direction = torch.lerp(weight.grad, momentum, quick).sign_()
                weight.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr)
                momentum.lerp_(weight.grad, 1 - slow)


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Return the optimizer that ``optim`` names; each of its groups says what it ``keeps``.

    Raises:
        ConfigError: if the model has nothing that it could train.
    """
    groups = param_groups(model, optim)
    if optim.name == "muon" and not any(group["orthogonal"] for group in groups):
        raise ConfigError(
            "muon moves the matrices of a model's layers, and none of them is trained",
            where="optim.name",
            value="muon",
            remedy="optim.name=adamw, or train more than embeddings, heads and vectors "
            "(model.freeze)",
        )
    for group in groups:
        group["keeps"] = keeps(optim, orthogonal=group["orthogonal"])
    if optim.name == "lion":
        assert optim.betas is not None
        return Lion(groups, lr=0.0, betas=optim.betas)
    if optim.name == "sgd":
        assert optim.momentum is not None
        return torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum)
    adamw: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps, "fused": True}
    if optim.name == "muon":
        assert optim.momentum is not None
        return Muon(groups, momentum=optim.momentum, **adamw)
    return torch.optim.AdamW(groups, **adamw)


def keeps(optim: Optim, *, orthogonal: bool) -> tuple[str, ...]:
    """Return the names of what is kept beside a weight."""
    if optim.name == "lion":
        return LION
    if optim.name == "sgd" or orthogonal:
        return MOMENTUM if optim.momentum else ()
    return ADAMW


def kept_a_weight(model: nn.Module, optim: Optim) -> float:
    """Return how many bytes are kept beside a trained weight of ``model``, on average."""
    kept = numel = 0
    for group in param_groups(model, optim):
        own = sum(param.numel() for param in group["params"])
        numel += own
        kept += FP32_BYTES * own * len(keeps(optim, orthogonal=group["orthogonal"]))
    return kept / max(1, numel)
