"""A number of a plan, with how it comes about: text, JSON and explanations are printed from the
same record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hfscale.monitor.clock import duration

GIB = 2.0**30


@dataclass(frozen=True)
class Figure:
    """``value`` in ``unit``; ``how`` is its formula with the numbers put in, or its source."""

    name: str
    value: float
    unit: str
    how: str

    def __str__(self) -> str:
        return shown(self.value, self.unit)


def shown(value: float, unit: str) -> str:
    """Return a number for people: 1.2 GiB, 70.6 B parameters, 2:03:04."""
    if unit == "bytes":
        return size(value)
    if unit == "s":
        return duration(value) if value >= 60 else f"{value:,.3g} s"
    if unit == "":
        return count(value)
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{count(value)} {unit}"


def size(value: float) -> str:
    """Return bytes for people, in powers of 1024."""
    for unit, scale in (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20)):
        if value >= 10 * scale or (value >= scale and unit != "TiB"):
            break
    number = value / scale
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:,.2f} {unit}"


def count(value: float) -> str:
    """Return a number of things for people: 950, 124 M, 70.6 B, 15 T."""
    for letter, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:,.4g} {letter}"
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def total(name: str, parts: Iterable[Figure]) -> Figure:
    """Return the sum of ``parts``, of one unit."""
    parts = list(parts)
    how = " + ".join(f"{part.name} {part}" for part in parts if part.value) or "nothing"
    unit = parts[0].unit if parts else "bytes"
    return Figure(name, sum(part.value for part in parts), unit, how)
