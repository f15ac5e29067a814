"""What an observer is: it looks at each step when that is done, and changes nothing of the run.

It may ask for a save or a stop. The ranks agree on both in the one all-reduce of the next step,
before anything of that step is computed, so the checkpoint is of the step that was looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hfscale.checkpoint.state import CheckpointState
from hfscale.dist.agree import Agreed
from hfscale.engine.engine import StepStats
from hfscale.monitor.metrics_log import Logged


@dataclass(frozen=True)
class Step:
    """A step that is done. ``tokens_seen`` and ``skipped_rows`` are those of the run so far."""

    number: int  # counted from 1
    watched: bool  # an observer wanted the figures of this step
    agreed: Agreed
    stats: StepStats
    tokens_seen: int
    skipped_rows: int
    # as metrics.jsonl has them, of a watched step: observers add to them, each for those after it;
    # the same on all ranks but for times
    figures: Logged = field(default_factory=dict)
    # what only pictures need, of a watched step: numbers by their tags in TensorBoard; rank 0's
    # are written
    details: dict[str, float] = field(default_factory=dict)


class Observer:
    """Looks at steps, on every rank, after those before it in the trainer's list."""

    save: bool = False  # the step it looked at should be saved
    stop: str = ""  # why the run should end here, for people

    def wants(self, step: int) -> bool:
        """Return whether ``step`` is to be watched. All ranks answer alike."""
        return False

    def look(self, step: Step) -> None:
        """Look at ``step``. All ranks call it together."""

    def rewind(self, saved: CheckpointState) -> None:
        """Forget what came after ``saved``: the run goes back to it."""

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps of this observer, by its keys there (JSON)."""
        return {}

    def close(self) -> None:
        """Leave what is open."""
