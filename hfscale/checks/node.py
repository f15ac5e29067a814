"""One rank of `hfscale doctor`: looks at its node and measures it, a second or so for each thing,
and prints a line a finding.

    python -m hfscale.checks.node '{"folder": FOLDER, ...}'        a ``Task``

Nothing is gathered over the network, so that a node with a broken network is heard too; the ranks
meet last. Lines on stdout that begin with MARK are findings, all others are of libraries. What a
run needs is not known here: who gathers the findings judges them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

from hfscale.checks.finding import MARK, Finding, failed
from hfscale.checks.table import Check, of_depth
from hfscale.dist.world import World, node_name
from hfscale.records import parse

if TYPE_CHECKING:
    import torch


@dataclass
class Task:
    """What the ranks look at, beside their machines."""

    folder: str = ""  # the run directory, or the nearest folder above it that is there
    token: str = ""  # a file that was just written there
    gpus: bool = False  # each rank should have one
    shards: list[str] = field(default_factory=list)  # manifests
    remote: dict[str, object] = field(default_factory=dict)  # how these are fetched from a URL


@dataclass(frozen=True)
class Node:
    """A rank on its node, as the checks see it."""

    task: Task
    world: World

    @cached_property
    def device(self) -> torch.device:
        """What this rank would train on."""
        import torch

        from hfscale.dist.group import gpu_of

        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", gpu_of(self.world))

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU that torch can use."""
        return self.device.type == "cuda"


def look(node: Node) -> Iterator[Finding]:
    """Yield what this rank finds, without its node's name."""
    for check in of_depth("node"):
        if check.each_rank or node.world.local_rank == 0:
            yield from look_once(check, node)


def look_once(check: Check, node: Node) -> Iterator[Finding]:
    """Yield what one check finds."""
    module, _, function = check.look.partition(":")
    try:
        yield from getattr(import_module(module), function)(node)
    except Exception as error:  # whatever a broken machine makes of a check: the others go on
        yield failed(check.name, error)


def main() -> None:
    """Print the findings of this rank."""
    import torch

    node = Node(parse(Task, sys.argv[1]), World.from_environment())
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints that it found none
    for finding in look(node):
        line = json.dumps(asdict(replace(finding, nodes=(node_name(),))))
        print(f"\n{MARK}{line}", flush=True)
    if torch.distributed.is_initialized():
        from hfscale.dist import group

        group.shutdown()


if __name__ == "__main__":
    main()
