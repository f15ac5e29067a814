"""A test of learning rates: the rate rises from step to step by a constant factor, and the loss
says which rates teach and from which one on it diverges.

Source: Smith 2017, Cyclical learning rates, sec. 3.3; that the rise is exponential, and that the
test ends where the loss diverges: Gugger 2018, "How do you find a good learning rate".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SMOOTH = 0.8  # of a smoothed loss, what comes from the steps before
DIVERGED = 1.15  # times the lowest smoothed loss
FEWEST = 5  # steps before a loss can diverge
TAUGHT = 0.005  # of the first loss, what it must fall at least
BELOW = 10.0  # a rate that is held for long diverges earlier than one that is passed by


@dataclass(frozen=True)
class Rising:
    """Rates from ``first`` to ``last`` in ``steps`` steps, counted from 1."""

    first: float
    last: float
    steps: int

    def rate(self, step: int) -> float:
        """Return the rate of a step."""
        part = (step - 1) / max(1, self.steps - 1)
        return float(self.first * (self.last / self.first) ** part)

    def diverged(self, losses: Sequence[float]) -> bool:
        """Return whether the last of ``losses`` says that the rate has become too high."""
        if not math.isfinite(losses[-1]):
            return True
        smooth = smoothed(losses)
        return len(losses) > FEWEST and smooth[-1] > DIVERGED * min(smooth)


@dataclass(frozen=True)
class Found:
    """What a test of rates says."""

    suggested: float | None  # None: no rate taught anything
    steepest: float | None  # at which the loss fell most a factor of the rate
    lowest: float  # with the lowest loss
    diverged: float | None  # None: none did


def find(rates: Sequence[float], losses: Sequence[float], *, diverged: bool) -> Found:
    """Return what a test says whose last rate ``diverged``, or not.

    Suggested is where the loss falls most, and at most a tenth of what diverges.
    """
    finite = [pair for pair in zip(rates, losses, strict=True) if math.isfinite(pair[1])]
    smooth = smoothed([loss for _, loss in finite])
    at = [rate for rate, _ in finite]
    too_high = rates[-1] if diverged else None
    if len(smooth) < FEWEST:
        return Found(None, None, at[0] if at else rates[0], too_high)
    low = min(range(len(smooth)), key=smooth.__getitem__)
    slopes = [
        (smooth[i + 1] - smooth[i - 1]) / math.log(at[i + 1] / at[i - 1])
        for i in range(1, max(2, low))
    ]
    steep = min(range(len(slopes)), key=slopes.__getitem__) + 1
    if smooth[low] > (1 - TAUGHT) * smooth[0]:
        return Found(None, None, at[low], too_high)
    most = too_high / BELOW if too_high else at[-1]
    return Found(min(at[steep], most), at[steep], at[low], too_high)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return a moving average of ``losses``, without a bias towards the first one."""
    values, mean = [], 0.0
    for count, loss in enumerate(losses, 1):
        mean = SMOOTH * mean + (1 - SMOOTH) * loss
        values.append(mean / (1 - SMOOTH**count))
    return values


def draw(rates: Sequence[float], losses: Sequence[float], found: Found, file: Path) -> None:
    """Write a picture of the loss over the rate, with what was found in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axis = figure.subplots()
    axis.plot(rates, losses, color="0.75", lw=1, label="loss of a step")
    axis.plot(rates, smoothed(losses), color="#1f5fa8", label="smoothed")
    marks = {
        "suggested": (found.suggested, "#3c8d5a"),
        "steepest": (found.steepest, "#e0a458"),
        "diverged": (found.diverged, "#d1495b"),
    }
    for name, (rate, colour) in marks.items():
        if rate is not None:
            axis.axvline(rate, color=colour, ls=":", label=f"{name}: {rate:.2g}")
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
