"""A time limit for Python code of strangers, in any thread: a chat template may loop for ever.

One watching thread a process looks four times a second at what is under way, so that a limit costs
a render next to nothing. What is past its limit gets an exception between two of its bytecodes; one
long call into C is not interrupted.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

POLL_S = 0.25


class TookTooLong(Exception):
    """Code was stopped at its time limit."""


class _Watch:
    """What is under way in this process: thread -> when it must be done."""

    def __init__(self) -> None:
        self.pid, self.lock = 0, threading.Lock()
        self.due: dict[int, float] = {}

    def begin(self, thread: int, seconds: float) -> None:
        with self.lock:
            if self.pid != os.getpid():  # also after a fork, which takes no threads along
                self.pid, self.due = os.getpid(), {}
                threading.Thread(target=self._look, daemon=True, name="deadlines").start()
            self.due[thread] = time.monotonic() + seconds

    def end(self, thread: int) -> None:
        with self.lock:
            self.due.pop(thread, None)

    def _look(self) -> None:
        while True:
            time.sleep(POLL_S)
            with self.lock:  # so that nothing is interrupted that has just ended
                now = time.monotonic()
                for thread in [thread for thread, due in self.due.items() if due < now]:
                    del self.due[thread]
                    kind = ctypes.py_object(TookTooLong)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)


_watch = _Watch()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise ``TookTooLong`` in the code inside after so many seconds."""
    thread = threading.get_ident()
    _watch.begin(thread, seconds)
    try:
        yield
    finally:
        _watch.end(thread)
