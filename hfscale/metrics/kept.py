"""What is kept of an evaluation: ``scores.json``, which `evaluate` writes and `compare` reads
again.
"""

from __future__ import annotations

from pathlib import Path

from hfscale.records import Count, Record, load


class Scores(Record):
    """The scores of a model, the ends of their intervals, and what is to be said of them."""

    model: str
    task: str | None = None
    objective: str | None = None  # of shards: its term
    tokens: Count | None = None  # of these
    versions: dict[str, object] | None = None  # of the harness's tasks
    options: dict[str, object] | None = None  # of the task
    left_out: Count = 0
    examples: Count = 0  # of shards: rows
    scores: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    notes: dict[str, str] = {}


def read_scores(file: Path) -> Scores:
    """Return what a file of scores says.

    Raises:
        DataError: if it is no such file.
    """
    remedy = "name a scores.json that evaluate kept"
    return load(file, Scores, what="the file of scores", remedy=remedy)
