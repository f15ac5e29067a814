"""Errors that a user can act on, and the exit codes every command and job shares.

A ``UserError`` is printed on one screen without a traceback and ends the process with exit code 2.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable
from difflib import get_close_matches

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request after a save; may be requeued or rerun
EXIT_UNHEALTHY = 76  # the numbers went wrong (non-finite, diverged): do not requeue
# ranks hung (who is to blame is written down), lost one another, or were superseded; may be requeued or rerun
EXIT_HUNG = 77

_UNSET = object()


class UserError(Exception):
    """What went wrong, where, the value that was found, and what to do about it."""

    def __init__(
        self, what: str, *, where: object = "", value: object = _UNSET, remedy: str = ""
    ) -> None:
        self.what, self.where, self.remedy = what, str(where), remedy
        self.value = None if value is _UNSET else value
        lines = [what]
        if self.where:
            lines.append(f"  where:  {self.where}")
        if value is not _UNSET:
            lines.append(f"  value:  {value!r}")
        if remedy:
            lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """Text, tokens, shards or tokenizers that are missing, damaged or do not fit together."""


class CheckpointError(UserError):
    """A checkpoint or run directory that cannot be used as asked."""


class UnhealthyError(Exception):
    """Training produced numbers that must not be saved or trained on (exit code 76)."""


class LostError(Exception):
    """This attempt cannot go on, but another one may (exit code 77)."""


class SupersededError(LostError):
    """A younger attempt has taken over the run directory."""


def exit_code(error: BaseException) -> int | None:
    """Return the exit code for an error that is not a defect of ours, after printing it; None for a defect.

    Of the system's errors, no space, no permission and a read-only disk are the user's.
    """
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
    ):
        error = UserError(
            f"cannot read or write: {error.strerror}",
            where=error.filename or "",
            remedy="make room or choose another folder, then run the same command again",
        )
    for kind, name, code in KINDS:
        if isinstance(error, kind):
            print(f"{name}: {error}", file=sys.stderr)
            return code
    return None


KINDS = (
    (UserError, "error", EXIT_USER_ERROR),
    (UnhealthyError, "unhealthy", EXIT_UNHEALTHY),
    (LostError, "lost", EXIT_HUNG),
)


def counted(number: int, noun: str) -> str:
    """Return "1 example", "2,000 examples"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a phrase that offers the valid names nearest to ``name``, or all of them."""
    known = sorted(known)
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if not known:
        return "there are none"
    return f"did you mean {' or '.join(close)}?" if close else f"valid names: {', '.join(known)}"


# gloo and NCCL, of a rank that died: the one that says so is not the cause
LOST_PEER = ("by peer", "remote process exited", "peer closed")


def lost_peer(error: BaseException) -> bool:
    """Return whether an error says no more than that another rank has ended."""
    return any(words in str(error) for words in LOST_PEER)
