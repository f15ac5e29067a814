"""What is kept of an evaluation: ``scores.json``, which `evaluate` writes and `compare` reads
again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfscale.records import Count, Record, load


class Scores(Record):
    """The scores of a model, the ends of their intervals, and what is to be said of them."""

    model: str
    task: str | None = None
    examples: Count = 0
    left_out: Count = 0
    scores: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    notes: dict[str, str] = {}


def read_scores(file: Path) -> dict[str, Any]:
    """Return what a file of scores says, with every key.

    Raises:
        DataError: if it is no such file.
    """
    remedy = "name a scores.json that evaluate kept"
    return load(file, Scores, what="the file of scores", remedy=remedy).model_dump()
