"""A request to stop, from a signal: a flag that the loop reads at the next step boundary, never an action of its own."""
from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, a launcher or Slurm, Slurm's --signal ahead of the limit


class StopRequest:
    """Set by the first signal. All ranks save and leave together, so nothing is done inside the handler."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def listen(self) -> StopRequest:
        """Return self, with handlers installed for ``SIGNALS``."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
