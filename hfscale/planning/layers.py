"""The layers of a model that are alike: a deep model is traced with few of them, since what a step
holds is exactly linear in layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from hfscale.planning.tracing import Trace, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_PERIOD = 12  # layers, after which a stack repeats itself


@dataclass(frozen=True)
class Deep:
    """A model of many layers, by two traces of few: ``second`` has one period of layers more than
    ``first``, and ``more`` periods follow on ``first``.
    """

    first: Trace
    second: Trace
    more: float
    layers: int
    traced: tuple[int, int]

    def of(self, figure: Callable[[Trace], float]) -> float:
        """Return ``figure`` of the whole model, which is linear in layers."""
        begin = figure(self.first)
        return begin + (figure(self.second) - begin) * self.more

    @property
    def how(self) -> str:
        """Which layers were traced, for people."""
        low, high = self.traced
        if low == high:
            return "traced whole on the meta device"
        return f"traced with {low} and {high} of {self.layers} layers on the meta device"


@dataclass(frozen=True)
class Stack:
    """Numbered layers of a model: the first ``start`` are of their own, then ``period`` repeat."""

    owner: nn.Module
    name: str
    start: int
    period: int

    @property
    def layers(self) -> nn.ModuleList:
        """All of them."""
        return cast(nn.ModuleList, self.owner._modules[self.name])


def stacks_of(model: PreTrainedModel) -> list[Stack]:
    """Return the stacks of layers of ``model`` that can be cut short alike; none: it must be traced
    whole.
    """
    lists, inside = list[tuple[nn.Module, str, nn.ModuleList]](), set[nn.Module]()
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and child not in inside and len(child) > 1:
                lists.append((owner, name, child))
                inside.update(child.modules())
    stacks = []
    for owner, name, layers in lists:
        start, period = _pattern([_signature(model, layers, n) for n in range(len(layers))])
        if start + 2 * period < len(layers):
            stacks.append(Stack(owner, name, start, period))
    periods = {(len(stack.layers) - stack.start) / stack.period for stack in stacks}
    return stacks if len(periods) == 1 else []


def _signature(model: PreTrainedModel, layers: nn.ModuleList, number: int) -> object:
    layer = layers[number]
    shapes = tuple((name, one.shape, one.requires_grad) for name, one in layer.named_parameters())
    kinds = getattr(model.config, "layer_types", None) or []
    kind = kinds[number] if len(kinds) == len(layers) else None
    return shapes, kind, tuple(type(module).__name__ for module in layer.modules())


def _pattern(signatures: Sequence[object]) -> tuple[int, int]:
    """Return after how many layers a stack begins to repeat itself, and the length of what
    repeats.
    """
    total = len(signatures)
    fitting = (
        (start, period)
        for reach in range(1, 2 * LONGEST_PERIOD)
        for period in range(1, min(reach, LONGEST_PERIOD) + 1)
        for start in (reach - period,)
        if signatures[start : total - period] == signatures[start + period :]
    )
    return next(fitting, (total, total))


@contextmanager
def cut(stacks: Sequence[Stack], periods: int) -> Iterator[list[nn.Module]]:
    """Leave ``periods`` repetitions in each stack; yield the layers of the last."""
    whole = [stack.layers for stack in stacks]
    last = list[nn.Module]()
    for stack, layers in zip(stacks, whole, strict=True):
        depth = stack.start + periods * stack.period
        stack.owner._modules[stack.name] = nn.ModuleList(list(layers)[:depth])
        last += list(layers)[depth - stack.period : depth]
    try:
        yield last
    finally:
        for stack, layers in zip(stacks, whole, strict=True):
            stack.owner._modules[stack.name] = layers


def trace_deep(
    model: PreTrainedModel,
    run: Callable[[nn.Module], Tensor],
    *,
    inputs: Sequence[Tensor],
    on_cpu: bool = False,
) -> Deep:
    """Return what a micro-batch of ``model`` holds, traced with two repetitions of its layers at
    most.
    """
    stacks = stacks_of(model)
    if not stacks:
        whole = trace(model, run, inputs=inputs, on_cpu=on_cpu)
        return Deep(whole, whole, 0.0, 0, (0, 0))
    traces, depths = list[Trace](), list[int]()
    for periods in (1, 2):
        with cut(stacks, periods) as last:
            traces.append(trace(model, run, inputs=inputs, on_cpu=on_cpu, parts_of=last))
            depths.append(sum(len(stack.layers) for stack in stacks))
    more = (len(stacks[0].layers) - stacks[0].start) / stacks[0].period - 1
    layers = sum(len(stack.layers) for stack in stacks)
    return Deep(traces[0], traces[1], more, layers, (depths[0], depths[1]))
