"""A gradient norm far above its neighbours is said when it happens, with the command that shows the
texts of that step.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW, LEAST = 100, 20  # steps whose median is the measure; how many there must be
FACTOR = 10.0  # above the median
QUIET_STEPS = 100  # after a notice, a run that has gone wild is not said at each step


class Spikes:
    """The norms of the last steps. A spike is not among them, so that one does not hide the
    next.
    """

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._said_at: int | None = None

    def look(self, step: int, grad_norm: float) -> str | None:
        """Return a notice if the gradient of ``step`` is far above the median of the steps before
        it.
        """
        usual = median(self._norms) if len(self._norms) >= LEAST else math.inf
        if grad_norm <= FACTOR * usual:
            self._norms.append(grad_norm)
            return None
        # fp16 lowers its loss scale; anything else has ended the run
        if not math.isfinite(grad_norm):
            return None
        if self._said_at is not None and step - self._said_at < QUIET_STEPS:
            return None
        self._said_at = step
        return (
            f"grad_norm {grad_norm:.4g} at step {step} is {grad_norm / usual:.0f} times the "
            "median of the steps before"
        )
