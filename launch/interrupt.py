"""Ctrl-C at a command: said at once and obeyed at once, whatever the command is in.

Training, predictions to a file and builds of shards have something to keep: they set handlers of
their own, stop in order and end with 75, and the same command goes on. Every other command ends
with 130 and leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


class Interrupted(BaseException):
    """Ctrl-C in the middle of something. No ``Exception``, so that nothing takes it for an error of
    its own.
    """


def say(line: str) -> None:
    """Print a line on stderr from within a handler of a signal, past all buffers and locks."""
    os.write(2, f"\n{line}\n".encode())


def listen(*, quietly: bool = False) -> None:
    """Let the first Ctrl-C end what is under way, folders for a while and all; the second kills.
    ``quietly``: there is nothing to clean up.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # nohup, or a shell's background job
        signal.signal(signal.SIGINT, _leave if quietly else _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    say("interrupted: cleaning up; Ctrl-C again kills")
    raise Interrupted


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted
