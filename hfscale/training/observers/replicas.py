"""Compares the weights of the ranks, now and then: where they are replicated they must be the same,
bit for bit.

At ZeRO 1 and 2 each update gathers the weights anew, so only what flipped since then is seen; at
ZeRO 3 there are no replicas.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hfscale.dist.agree import from_all_ranks
from hfscale.dist.world import node_name
from hfscale.engine.engine import Engine
from hfscale.engine.replicas import digest
from hfscale.monitor import incidents
from hfscale.training.observers.base import Observer, Step
from hfscale.training.observers.health import Health, Offence


@dataclass
class Replicas(Observer):
    """Tells ``health`` where a rank has other weights. Collective every ``every_steps``."""

    engine: Engine
    health: Health
    every_steps: int
    good: int = 0  # the last step after which all were the same

    def look(self, step: Step) -> None:
        """Compare, if it is time.

        Raises:
            UnhealthyError: on all ranks, if they differ and the run must stop.
        """
        if step.number % self.every_steps or self.engine.stage == 3 or self.engine.all.size == 1:
            return
        told = from_all_ranks([digest(self.engine.module), node_name()])
        usual, _ = Counter(number for number, _ in told).most_common(1)[0]
        odd = [
            f"rank {rank} on {node}" for rank, (number, node) in enumerate(told) if number != usual
        ]
        if not odd:
            self.good = step.number
            return
        text = f"{', '.join(odd)}: other weights than the rest, since step {self.good + 1} or later"
        self.health.judge(
            Offence(step.number, incidents.REPLICAS, text, {"ranks": len(odd)}, first=self.good + 1)
        )
