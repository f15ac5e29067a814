"""Checks that take all ranks: that they meet, how fast they sum, and how far their clocks are
apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.distributed as torch_dist

from hfscale.checks.finding import STATES, Finding, measured
from hfscale.checks.node import Node
from hfscale.dist import group
from hfscale.dist.agree import from_all_ranks

ELEMENTS = {"cuda": 2**26, "cpu": 2**22}  # of a sum
TIMES = 5
FAR_S, TOO_FAR_S = 1.0, 30.0  # clocks


def rendezvous(node: Node) -> Iterator[Finding]:
    """Yield that all ranks have met."""
    world = node.world
    group.start(world)
    group.barrier()
    place = f"{world.master_addr}:{world.master_port}"
    yield Finding("rendezvous", "ok", f"{world.all.size} ranks at {place}")


def all_reduce(node: Node) -> Iterator[Finding]:
    """Yield the bus bandwidth of a sum over all ranks: what each sends and receives."""
    size = node.world.all.size
    if size == 1 or not torch_dist.is_initialized():  # `rendezvous` says why
        return
    tensor = torch.ones(ELEMENTS[node.device.type], device=node.device)

    def add() -> None:
        torch_dist.all_reduce(tensor)
        float(tensor[0])  # waits for it

    add()
    begun = time.perf_counter()
    for _ in range(TIMES):
        add()
    took = (time.perf_counter() - begun) / TIMES
    moved = 2 * (size - 1) / size * tensor.numel() * tensor.element_size()
    kind = "NCCL" if node.on_gpu else "gloo"
    yield measured("all-reduce", moved / took / 1e9, f"GB/s (bus bandwidth, {kind})")


def clocks(node: Node) -> Iterator[Finding]:
    """Yield how far the clock of this rank is from that of rank 0."""
    if node.world.all.size == 1 or not torch_dist.is_initialized():
        return
    group.barrier()
    times = from_all_ranks(time.time())
    apart = round(abs(times[node.world.all.rank] - times[0]), 2)
    state = STATES[(apart > FAR_S) + (apart > TOO_FAR_S)]
    yield Finding("clocks", state, f"{apart:.1f} s apart", value=apart, unit="s apart")
