"""What is looked for, as pure functions of trials: the largest size that fits, and which of several
candidates is faster, measured in turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

TURNS = 2
WARM_STEPS = 2  # the first steps of a trial: kernels are compiled and memory is taken


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of the ascending ``sizes`` that fits, by bisection; None if none does.
    What fits, fits smaller too.
    """
    low, high = -1, len(sizes)  # the last that fits, the first that does not
    while high - low > 1:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle
        else:
            high = middle
    return sizes[low] if low >= 0 else None


@dataclass
class Speed:
    """Tokens a second of a candidate: medians of its turns."""

    turns: list[float] = field(default_factory=list)
    problem: str = ""  # why it does not run

    @property
    def median(self) -> float:
        """Of all turns."""
        return statistics.median(self.turns)

    def __str__(self) -> str:
        if self.problem:
            return f"does not run: {self.problem}"
        edges = f"{min(self.turns):,.0f} to {max(self.turns):,.0f}"
        return f"{self.median:,.0f} tokens/s ({edges} in {len(self.turns)} turns)"


def in_turns(
    candidates: Sequence[str], measure: Callable[[str], float | str], *, turns: int = TURNS
) -> dict[str, Speed]:
    """Return how fast each candidate is. They are measured one after another, again and again,
    because a machine's speed wanders; ``measure`` returns tokens/s, or why there are none.
    """
    speeds = {name: Speed() for name in candidates}
    for _ in range(turns):
        for name, speed in speeds.items():
            if speed.problem:
                continue
            figure = measure(name)
            if isinstance(figure, str):
                speed.problem = figure
            else:
                speed.turns.append(figure)
    return speeds


def faster(speeds: Mapping[str, Speed], *, now: str) -> str:
    """Return the fastest candidate, if its slowest turn beats the best one of ``now``; else
    ``now``: what is within the spread is no gain.
    """
    running = {name: speed for name, speed in speeds.items() if not speed.problem}
    if now not in running:
        return max(running, key=lambda name: running[name].median) if running else now
    best = max(running, key=lambda name: running[name].median)
    return best if min(running[best].turns) > max(running[now].turns) else now


def steady(tokens_per_s: Sequence[float]) -> float:
    """Return tokens/s of a trial: the median of its steps after the first ones."""
    return statistics.median(tokens_per_s[WARM_STEPS:] or tokens_per_s[-1:])
