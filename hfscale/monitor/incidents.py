"""What was wrong with a step, and what was done about it: ``RUN_DIR/incidents.jsonl``.

Rank 0 appends a line at once, before the run acts on it. So the file is also the journal of the
rows that rewinds have left out: an attempt that died before its next checkpoint has lost none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import FiniteFloat

from hfscale.monitor.lines import read_lines
from hfscale.records import Count, Record
from hfscale.run_files import INCIDENTS

Decision = Literal["warn", "skip", "rewind", "stop"]
ACTS: tuple[Decision, ...] = ("skip", "rewind")  # what counts against the budget

# kinds
NOT_FINITE = "gradient_not_finite"
GRADIENT = "gradient_spike"
ZERO = "gradient_zero"
STILL = "layer_still"
FLOOR = "loss_scale_floor"
LOSS_NOT_FINITE = "loss_not_finite"
LOSS = "loss_spike"
DIVERGENCE = "divergence"
VALIDATION = "validation_contradicts"
REPLICAS = "replicas_differ"
STRAGGLER = "straggler"


class Place(Record):
    """Where a row of a step lies in the data."""

    position: Count  # in the order of the run
    shard: str
    documents: tuple[Count, ...]  # the first and the last in it, numbered in the shard


class Incident(Record):
    """A step, what was wrong with it, and what was done."""

    step: Count
    kind: str
    decision: Decision
    text: str  # for people
    scores: dict[str, float | None] = {}
    # of the step, by position in the order of the run: the first, and the one after the last
    rows: tuple[Count, ...] = ()
    places: tuple[Place, ...] = ()
    # of a rewind: to the checkpoint of this step, without these rows from now on (first, after)
    back_to: Count | None = None
    left_out: tuple[tuple[Count, Count], ...] = ()
    time: FiniteFloat = 0.0  # seconds of the epoch
    attempt: Count = 0

    def stamped(self, attempt: int) -> Incident:
        """Return the incident with the time of now."""
        return self.model_copy(update={"time": round(time.time(), 3), "attempt": attempt})


def incidents(run_dir: Path) -> list[Incident]:
    """Return the incidents of a run, oldest first.

    Raises:
        DataError: if a line is damaged.
    """
    return [*read_lines(run_dir / INCIDENTS, Incident)]


def left_out(found: Sequence[Incident]) -> list[tuple[int, int]]:
    """Return the rows that rewinds have left out, as (first, after the last)."""
    return [span for incident in found for span in incident.left_out]
