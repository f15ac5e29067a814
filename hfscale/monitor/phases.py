"""The clock of a rank: how many seconds it has spent in each phase since its process began.

``beat(phase)`` (monitor/heartbeat.py) names the phase of a step that begins; what comes before the
first step is cut finer here, into phases whose names begin with ``START``. What happens on a GPU is
counted where the host waits for it.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict

START = "start/"
IMPORTS = START + "imports"  # Python itself, and what it loads


class Phases:
    """Seconds by phase. Only the training thread enters phases; any thread may look."""

    def __init__(self) -> None:
        self._begin(age_s=process_age_s())
        self._used = False

    def _begin(self, *, age_s: float) -> None:
        self.began = time.time() - age_s  # in seconds of the epoch
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._phase, self._since = IMPORTS, time.perf_counter() - age_s

    def restart(self) -> None:
        """Begin anew where this process has worked on another run before."""
        if self._used:
            self._begin(age_s=0.0)
        self._used = True

    def enter(self, phase: str) -> None:
        """End the phase under way; ``phase`` begins."""
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def seconds(self) -> dict[str, float]:
        """Return the seconds by phase, with those of the phase under way."""
        phase, so_far = self._phase, time.perf_counter() - self._since
        seconds = dict(self._seconds)
        return seconds | {phase: seconds.get(phase, 0.0) + so_far}


def process_age_s() -> float:
    """Return how long this process has lived, as Linux counts (in hundredths of a second)."""
    with open("/proc/self/stat", "rb") as file:
        # the name of the program, in brackets, may hold anything
        fields = file.read().rpartition(b")")[2].split()
    ticks = int(fields[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


PHASES = Phases()  # of this process
