"""Gradients enter ZeRO's reduction in one order, and each of them, on every rank: whichever
parameters took part there.

ZeRO 2 and 3 put gradients into buckets as a backward pass brings them, and sum the buckets of all
ranks element by element. Where a rank used other parameters than its peers (skipped layers,
branches, experts that saw no token), it would add the gradient of one parameter to that of another;
and ZeRO 3 would keep, for a parameter that no rank used, the gradient of the step before. So a
gradient that comes early waits for those before it, and at the end of a backward pass those that
did not come are zeros. Where all take part nothing waits and nothing is made.

Stages 0 and 1 reduce once a step, in the order of the parameters: there the missing ones are filled
in (``fill``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn

from hfscale.dist.group import TIMEOUT, everybody, host_group
from hfscale.errors import ConfigError


class Arrivals:
    """What stands between the hooks of ZeRO 2 or 3 and their buckets."""

    def __init__(self, module: nn.Module, zero: Any, *, stage: int) -> None:
        self._zero, self._stage = zero, stage
        self._reduce = zero.reduce_ready_partitions_and_remove_grads
        self._finish = zero.overlapping_partition_gradients_reduce_epilogue
        zero.reduce_ready_partitions_and_remove_grads = self._arrived
        zero.overlapping_partition_gradients_reduce_epilogue = self._complete
        groups = zero.bit16_groups if stage == 2 else zero.fp16_groups
        self._group = {param: number for number, group in enumerate(groups) for param in group}
        # a guess, and good for most; the first backward pass tells
        self._order: list[nn.Parameter] = [
            param for param in module.parameters() if param.requires_grad
        ][::-1]
        self._came: dict[nn.Parameter, None] = {}  # in this backward pass, in order
        self._reduced = 0  # of ``_order``
        self._learned = False

    def _arrived(self, param: nn.Parameter, *_: int) -> None:
        """Take a gradient from its hook, and pass on all whose turn it is."""
        self._came[param] = None
        while self._reduced < len(self._order) and self._order[self._reduced] in self._came:
            self._pass_on(self._order[self._reduced])

    def _complete(self) -> None:
        """At the end of a backward pass: what is missing is zero."""
        if self._stage == 2:
            self._zero.setup_buckets()  # where not one gradient came
        while self._reduced < len(self._order):
            param = self._order[self._reduced]
            if param not in self._came:
                _set_zeros(param)
            self._pass_on(param)
        self._finish()
        if not self._learned:
            self._learn()
        self._came.clear()
        self._reduced = 0

    def _pass_on(self, param: nn.Parameter) -> None:
        self._reduced += 1
        self._reduce(param, *([self._group[param]] if self._stage == 2 else []))

    def _learn(self) -> None:
        """Order by the first backward pass of rank 0; what came to other ranks alone follows, and
        what came to none is last.
        """
        place = {param: number for number, param in enumerate(self._order)}
        ranked = torch.full((len(place),), 2 * len(place))
        for number, param in enumerate(self._came):
            ranked[place[param]] = number
        everyone = everybody()
        if everyone.size > 1:
            if everyone.rank > 0:
                ranked[ranked < len(place)] = len(place)
            torch_dist.all_reduce(ranked, op=torch_dist.ReduceOp.MIN, group=host_group())
        self._order = [
            self._order[number] for number in torch.argsort(ranked, stable=True).tolist()
        ]
        self._learned = True


class SameModules:
    """Whether all ranks went through the same modules: at ZeRO 3 each of them gathers its weights
    from every rank.
    """

    def __init__(self, zero: Any) -> None:
        self._trace = 0
        # of its own: where ranks differ, those that DeepSpeed uses hold collectives that match no
        # others
        self._group = torch_dist.new_group(backend="gloo", timeout=TIMEOUT)
        coordinator = zero.parameter_offload.get_param_coordinator()
        fetch = coordinator.fetch_sub_module

        def noted(module: Any, forward: bool) -> Any:
            if forward and torch.is_grad_enabled():
                self._trace = hash((self._trace, module.ds_id))
            return fetch(module, forward)

        coordinator.fetch_sub_module = noted

    def check(self) -> None:
        """Return if all ranks did since the last check. Collective.

        Raises:
            ConfigError: on every rank, if not: they may have taken one module's weights for
                another's.
        """
        ends = torch.tensor([self._trace, -self._trace])
        self._trace = 0
        torch_dist.all_reduce(ends, op=torch_dist.ReduceOp.MAX, group=self._group)
        if ends[0] != -ends[1]:
            raise self.error()

    @staticmethod
    def error() -> ConfigError:
        """Return what to raise where ``check`` or DeepSpeed, while it records its first steps,
        found a difference.
        """
        return ConfigError(
            "the ranks went through different modules of the model in one step, which ZeRO 3 "
            "cannot train",
            where="engine.zero_stage",
            value=3,
            remedy="engine.zero_stage=2 (the weights were not changed: the run goes on from "
            "its last checkpoint)",
        )


def fill(zero: Any, params: list[nn.Parameter], *, stage: int) -> None:
    """Give zeros to those of ``params`` that no backward pass of this step reached, at stage 0 or
    1.
    """
    accumulator = "grad_accum" if stage == 1 and zero.use_grad_accum_attribute else "grad"
    for param in params:
        if getattr(param, accumulator, None) is None:
            dtype = zero.gradient_accumulation_dtype if accumulator == "grad_accum" else param.dtype
            setattr(param, accumulator, torch.zeros_like(param, dtype=dtype))


def _set_zeros(param: Any) -> None:
    """Give ``param`` a gradient of zeros. At ZeRO 3 it is whole, in parts or on its way: the
    gradient is of the whole.
    """
    param.grad = torch.zeros_like(param)
    if hasattr(param, "ds_shape"):
        param.grad.data = torch.zeros(param.ds_shape, dtype=param.dtype, device=param.device)
