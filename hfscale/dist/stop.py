"""A request to stop, from a signal: a flag that the loop reads at the next step boundary, never an
action of its own.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType

from hfscale.errors import EXIT_INTERRUPTED

# Slurm's --signal ahead of a limit, as our scripts and as submitit ask for it
WARNINGS = (
    signal.SIGUSR1,
    signal.SIGUSR2,
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS)  # Ctrl-C; a launcher or Slurm


@contextmanager
def ended_by_ctrl_c(say: str) -> Iterator[None]:
    """Let Ctrl-C end the process inside, at once and with the line ``say``, although the main
    thread is in native code.

    Such code hears no signal until it returns. For work that has nothing on disk before it is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    # whatever else listens would race with the thread: it alone ends the process
    handler = signal.signal(signal.SIGINT, lambda *_: None)

    def watch() -> None:
        while numbers := os.read(heard, 64):
            if signal.SIGINT in numbers:
                os.write(2, f"\n{say}\n".encode())
                os._exit(EXIT_INTERRUPTED)
        os.close(heard)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(before)
        os.close(told)


class StopRequest:
    """Set by the first signal. All ranks save and leave together, so nothing is done inside the
    handler.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._say: str | None = None

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def listen(
        self, signals: Collection[signal.Signals] = SIGNALS, *, say: str | None = None
    ) -> StopRequest:
        """Return self, with handlers for ``signals``; one that was held back until now
        (slurm/train.sbatch) is heard.

        Where a person presses Ctrl-C, ``say`` is the line that answers.
        """
        self._say = say
        for number in signals:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return self

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if self._say and number == signal.SIGINT:
            os.write(2, f"\n{self._say}; Ctrl-C again kills\n".encode())  # past locks and buffers
            signal.signal(signal.SIGINT, signal.SIG_DFL)
