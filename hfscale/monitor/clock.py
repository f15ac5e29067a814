"""Lengths of time, as people say them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a length of time for people: 3.2 s, 4:05, 2:03:04, 3 d 2:03:04."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days} d {clock}" if days else clock
