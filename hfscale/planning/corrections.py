"""What the runs of a root teach about plans: how far memory and steps were off, as a factor
with an interval.

A factor is the median of seen / planned over the runs of one device, in logarithms, and the
interval what nine in ten of them lie in, by the median absolute deviation; so one odd run neither
moves it nor widens it. Of fewer than three runs the interval is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

from pydantic import Field

from hfscale import run_files
from hfscale.errors import UserError
from hfscale.log import logger
from hfscale.planning.figures import Figure, shown
from hfscale.records import Count, Record, load

MEMORY, STEP, SAVE = "memory", "step", "save"
UNITS: Mapping[str, str] = {MEMORY: "bytes", STEP: "s", SAVE: "s"}
NORMAL = 1.4826  # MAD of a normal distribution of deviation 1, inverted
NINE_IN_TEN = 1.645  # deviations on each side
FEW = 3  # runs, below which their spread says nothing
GUESS = 0.20  # then


Amount = Annotated[float, Field(gt=0, lt=1e18)]  # bytes, or seconds


class Checked(Record):
    """``plan.json`` of a run: what was planned for it, and what it took. ``setup`` is what the plan
    depended on, ``measured`` whether its speeds were doctor's; numbers are in ``UNITS``, and a run
    may lack some.
    """

    device: str
    attempt: Count
    setup: dict[str, str | int | float | bool]
    planned: dict[str, Amount]
    seen: dict[str, Amount]
    measured: bool = False


@dataclass(frozen=True)
class Correction:
    """By what a planned number is multiplied, and what nine in ten runs lie in."""

    factor: float
    low: float
    high: float
    runs: int

    def apply(self, planned: Figure) -> Figure:
        """Return what runs say that ``planned`` will be."""
        value = planned.value * self.factor
        edges = (shown(planned.value * edge, planned.unit) for edge in (self.low, self.high))
        how = (
            f"{planned} x {self.factor:.3f}, the median of {self.runs} checked "
            f"run{'s' if self.runs > 1 else ''} here; {' to '.join(edges)}"
        )
        return Figure(planned.name, value, planned.unit, how)


def correction(pairs: Sequence[tuple[float, float]]) -> Correction | None:
    """Return the correction that ``(planned, seen)`` of several runs ask for; None: there are
    none.
    """
    logs = [math.log(seen / planned) for planned, seen in pairs if seen > 0 and planned > 0]
    if not logs:
        return None
    middle = median(logs)
    deviation = NORMAL * median(abs(one - middle) for one in logs)
    reach = NINE_IN_TEN * max(deviation, 0.01)
    if len(logs) < FEW:
        reach = math.log(1 + GUESS)
    low, high = math.exp(middle - reach), math.exp(middle + reach)
    return Correction(math.exp(middle), low, high, len(logs))


def corrections(root: Path, *, device: str, measured: bool) -> dict[str, Correction]:
    """Return the correction of each quantity, by the checked runs in ``root`` on ``device``. Times
    are learnt of plans alone whose speeds are known alike: ``measured`` by doctor, or not.
    """
    checked = [one for one in _checked(root) if one.device == device]
    found = dict[str, Correction]()
    for name in UNITS:
        pairs = [
            (one.planned[name], one.seen[name])
            for one in checked
            if name in one.planned
            and name in one.seen
            and (name == MEMORY or one.measured == measured)
        ]
        if one := correction(pairs):
            found[name] = one
    return found


def _checked(root: Path) -> Iterator[Checked]:
    """Yield what was written of the runs in ``root``; a damaged file says nothing."""
    for file in sorted(root.glob(f"*/{run_files.PLAN}")):
        try:
            yield load(file, Checked, what="the plan of a run")
        except UserError as error:
            logger.warning(f"{file} is left out: {error.what}")
