"""A request to stop, from a signal: a flag that the loop reads at the next step boundary, never an action of its own."""

from __future__ import annotations

import signal
from collections.abc import Collection
from types import FrameType

WARNINGS = (
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # Slurm's --signal ahead of a limit, as our scripts and as submitit ask for it
SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS)  # Ctrl-C; a launcher or Slurm


class StopRequest:
    """Set by the first signal. All ranks save and leave together, so nothing is done inside the handler."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def listen(self, signals: Collection[signal.Signals] = SIGNALS) -> StopRequest:
        """Return self, with handlers for ``signals``; one that was held back until now (slurm/train.sbatch) is heard."""
        for number in signals:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return self

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
