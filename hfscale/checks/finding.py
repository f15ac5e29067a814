"""What a check finds: one record, whichever of the depths it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hfscale.errors import UserError

MARK = "hfscale-doctor "  # begins a finding on a rank's stdout
State = Literal["ok", "warn", "fail"]
NO_GPU = "torch sees none"  # what "GPU" says of a node that computes on cores
STATES: tuple[State, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """What one check found, of the node that it looked at.

    A measurement has a ``value`` in ``unit``: more is better. What it is compared with, the needs
    of the run and what the other ranks have, comes in when all are together (``judge.py``).
    """

    check: str  # the name of its row in ``table.py``
    state: State
    said: str
    needs: str = ""  # what the run needs of it, and how that comes about; "" where nobody knows
    remedy: str = ""
    nodes: tuple[str, ...] = ()
    value: float | None = None
    unit: str = ""
    # below which part of the median of all ranks it is a warning, a failure
    slow: tuple[float, float] = (0.0, 0.0)


def figure(value: float) -> str:
    """Return a number as people read it: three digits, or all of a large one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measured(
    check: str, value: float, unit: str, *, slow: tuple[float, float] = (0.0, 0.0)
) -> Finding:
    """Return a measurement, which is not judged yet."""
    return Finding(check, "ok", f"{figure(value)} {unit}", value=value, unit=unit, slow=slow)


def failed(check: str, error: Exception) -> Finding:
    """Return a check that ended in an error."""
    if not isinstance(error, UserError):
        return Finding(check, "fail", f"{type(error).__name__}: {error}")
    value = "" if error.value is None else f": {error.value}"
    return Finding(check, "fail", f"{error.what}: {error.where}{value}", remedy=error.remedy)


def product_rate(precision: str) -> str:
    """Return the unit of a rate of matrix products in ``precision``."""
    return f"TFLOP/s a rank, {precision}"
