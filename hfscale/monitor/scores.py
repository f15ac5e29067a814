"""How far a number is out of the ordinary, by those before it.

A value is compared with the median of the few before it, so that a loss that falls, or a norm that
rises in a warm-up, is its own measure; what is left is measured by the median and the MAD of the
same residuals over a window. So the ordinary noise of a run decides, and no spike hides the next.
Source: Leys et al. 2013, Detecting outliers (median absolute deviation).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

import numpy as np

NEAR = 9  # values before, whose median is the level
LEAST = 64  # residuals that are a measure
NORMAL = 1.4826  # MAD of a normal distribution of deviation 1, inverted


@dataclass(frozen=True)
class Measure:
    """What is ordinary now: ``level`` of the values, ``middle`` and ``deviation`` of what lies
    between a value and its level.
    """

    level: float
    middle: float
    deviation: float


class Window:
    """The last ``size`` values of a series, and what is out of the ordinary after them.

    ``floor`` is the least deviation that is taken for ordinary noise: with ``logarithmic`` in the
    logarithm of positive values, else as a fraction of the level.
    """

    def __init__(self, size: int, *, floor: float, logarithmic: bool = False) -> None:
        self._floor, self._logarithmic = floor, logarithmic
        self._least = min(LEAST, size)
        # step, value, and the value above its level; of the first few there is no level
        self._kept: deque[tuple[int, float, float]] = deque(maxlen=size + NEAR)
        self._measure: Measure | None = None

    def score(self, value: float) -> float:
        """Return how many robust deviations ``value`` lies above its level; 0 while that is not
        known.
        """
        measure = self._measure
        if measure is None:
            return 0.0
        return (self._scaled(value) - measure.level - measure.middle) / measure.deviation

    def above(self) -> Callable[[float, float], float]:
        """Return what tells how many deviations of now a value lies above another one, whatever the
        window takes in or forgets later.
        """
        deviation = self._measure.deviation if self._measure else math.inf
        return lambda value, other: (self._scaled(value) - self._scaled(other)) / deviation

    def add(self, step: int, value: float, *, most: float) -> None:
        """Take the ``value`` of ``step`` in; one with a score above ``most`` as if it had that, so
        that a lasting new level becomes the ordinary one in the end.
        """
        measure, scaled = self._measure, self._scaled(value)
        if measure is not None:
            scaled = min(scaled, measure.level + measure.middle + most * measure.deviation)
        if math.isfinite(scaled):
            self._append(step, scaled)
            self._measure = self._measured()

    @property
    def known(self) -> bool:
        """Whether there are values enough to say what is ordinary."""
        return self._measure is not None

    def level(self) -> float | None:
        """Return the median of the last few values, None without any."""
        last = self._last()
        if not last:
            return None
        return math.exp(median(last)) if self._logarithmic else median(last)

    def forget(self, step: int) -> None:
        """Forget ``step`` and what came after it: the run goes back."""
        while self._kept and self._kept[-1][0] >= step:
            self._kept.pop()
        self._measure = self._measured()

    def state(self) -> list[list[float]]:
        """Return the values with their steps, for a checkpoint."""
        return [[float(step), value] for step, value, _ in self._kept]

    def load(self, state: Sequence[Sequence[float]]) -> None:
        """Take over what ``state`` returned."""
        self._kept.clear()
        for step, value in state:
            self._append(int(step), value)
        self._measure = self._measured()

    def _append(self, step: int, value: float) -> None:
        last = self._last()
        if len(last) < NEAR:
            self._kept.append((step, value, math.nan))
        else:
            self._kept.append((step, value, value - median(last)))

    @property
    def _levelless(self) -> int:
        """How many of the first values have no level before them."""
        return sum(math.isnan(above) for _, _, above in islice(self._kept, NEAR))

    def _scaled(self, value: float) -> float:
        if not self._logarithmic:
            return value
        return math.log(value) if value > 0 else -math.inf

    def _last(self) -> list[float]:
        newest = islice(reversed(self._kept), NEAR)
        return [value for _, value, _ in newest]

    def _measured(self) -> Measure | None:
        residuals = np.array([above for _, _, above in self._kept][self._levelless :])
        if len(residuals) < self._least:
            return None
        level, middle = median(self._last()), _middle(residuals)
        spread = NORMAL * _middle(abs(residuals - middle))
        floor = self._floor if self._logarithmic else self._floor * abs(level)
        return Measure(level, middle, max(spread, floor, 1e-12))


def _middle(values: np.ndarray) -> float:
    """Return the upper median, without numpy's checks, which take longer."""
    return float(np.partition(values, len(values) // 2)[len(values) // 2])
