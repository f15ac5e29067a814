"""Marks of where an attempt's time went, and how long it took until the first step."""

from __future__ import annotations

import time
from pathlib import Path

from hfscale import run_files
from hfscale.checkpoint.state import CheckpointState
from hfscale.log import logger
from hfscale.monitor.fence import Fence
from hfscale.monitor.lines import Lines
from hfscale.monitor.phases import PHASES, START
from hfscale.training.observers.base import Observer, Step


class Goodput(Observer):
    """Writes to goodput.jsonl, on rank 0: at the start, after the first step, with each watched
    step and each save, and at the end.
    """

    def __init__(self, run_dir: Path, *, step: int, fence: Fence | None) -> None:
        self._lines = Lines(run_dir / run_files.GOODPUT, fence=fence)
        self._fence, self._step, self._first = fence, step, True
        self._mark()

    def look(self, step: Step) -> None:
        """Mark ``step``, if it is one to be marked."""
        self._step = step.number
        if self._first or step.watched or step.agreed.due or step.agreed.stop:
            self._mark()
        if self._first:
            logger.info(self._first_step())
        self._first = False

    def rewind(self, saved: CheckpointState) -> None:
        """Mark that the run is back at an older step."""
        self._step = saved.step
        self._mark()

    def close(self) -> None:
        """Mark the end."""
        self._mark()
        self._lines.close()

    def _mark(self) -> None:
        self._lines.append(
            {
                "attempt": self._fence.number if self._fence else 0,
                "step": self._step,
                "began": round(PHASES.began, 3),
                "time": round(time.time(), 3),
                "phases": {name: round(spent, 3) for name, spent in PHASES.seconds().items()},
            }
        )

    def _first_step(self) -> str:
        """Return how long it took from the launcher's start to the end of the first step."""
        seconds = PHASES.seconds()
        owner = self._fence.owner() if self._fence else None
        launch_s = max(0.0, PHASES.began - owner.at) if owner and owner.at else 0.0
        before = {name: spent for name, spent in seconds.items() if name.startswith(START)}
        parts = {
            "launch": launch_s,
            **{name.removeprefix(START): spent for name, spent in before.items()},
            "first batch": seconds.get("data", 0.0),
        }
        in_all_s = launch_s + sum(seconds.values())
        parts["first step"] = in_all_s - sum(parts.values())
        words = ", ".join(f"{name} {spent:.1f}" for name, spent in parts.items() if spent >= 0.05)
        return f"first step done after {in_all_s:.1f} s: {words}"
