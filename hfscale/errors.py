"""Errors that a user can act on, and the exit codes every command and job shares.

A ``UserError`` is printed on one screen without a traceback and ends the process with exit code 2.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request after a save; may be requeued or rerun
EXIT_UNHEALTHY = 76  # the numbers went wrong (non-finite, diverged): do not requeue
# ranks hung (who is to blame is written down), lost one another, or were superseded; may be
# requeued or rerun
EXIT_HUNG = 77
EXIT_INTERRUPTED = 130  # Ctrl-C, and nothing was kept: 128 + SIGINT, as shells say it

_UNSET = object()


PASSWORD = re.compile(r"(?<=//)[^/@\s]*:[^/@\s]+(?=@)")  # and the name before it, of a URL


def shown(text: str, *, lines: bool = False) -> str:
    """Return ``text``, in which others may have a say, for a terminal or a log.

    What would move a cursor, or write from right to left, is spelled out; passwords of URLs are
    not. With ``lines`` it may have several, of which the later are indented: none looks like a line
    of ours.
    """
    text = PASSWORD.sub("***", text)
    kept = "\n\t" if lines else "\t"
    text = "".join(
        char if char.isprintable() or char in kept else ascii(char)[1:-1] for char in text
    )
    return re.sub(r"\n(?!  )", "\n  ", text)


def literal(text: object) -> str:
    """Return ``text`` as a Python literal (and YAML's, and JSON's for what can be printed),
    whatever is in it.
    """
    return shown(json.dumps(str(text), ensure_ascii=False))


class UserError(Exception):
    """What went wrong, where, the value that was found, and what to do about it."""

    def __init__(
        self, what: str, *, where: object = "", value: object = _UNSET, remedy: str = ""
    ) -> None:
        self.what, self.where, self.remedy = shown(what, lines=True), shown(str(where)), remedy
        self.value = None if value is _UNSET else value
        lines = [self.what]
        if self.where:
            lines.append(f"  where:  {self.where}")
        if value is not _UNSET:
            lines.append(f"  value:  {shown(repr(value))}")
        if remedy:
            lines.append(f"  remedy: {shown(remedy, lines=True)}")
        super().__init__("\n".join(lines))


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """Text, tokens, shards or tokenizers that are missing, damaged or do not fit together."""


class CheckpointError(UserError):
    """A checkpoint or run directory that cannot be used as asked."""


USERS_MATTER = {  # of the system's errors: what to do about them
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
        "make room or choose another folder, then run the same command again",
    ),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "give a shorter path, without such links"),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EISDIR), "name a folder where one is wanted, else a file"
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit: ulimit -n 4096"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "look at the disk, then run the same command again"),
}


class UnhealthyError(Exception):
    """Training produced numbers that must not be saved or trained on (exit code 76)."""


class LossScaleError(UnhealthyError):
    """fp16 has no lower loss scale."""


class LostError(Exception):
    """This attempt cannot go on, but another one may (exit code 77)."""


class SupersededError(LostError):
    """A younger attempt has taken over the run directory."""


def exit_code(error: BaseException) -> int | None:
    """Return the exit code for an error that is not a defect of ours, after printing it; None for a
    defect.
    """
    error = _in_our_words(error)
    for kind, name, code in KINDS:
        if isinstance(error, kind):
            print(f"{name}: {error}", file=sys.stderr)
            return code
    return None


def code_of(error: BaseException) -> int:
    """Return the exit code of a rank that an error ends, whatever it is."""
    ours = _in_our_words(error)
    other = EXIT_HUNG if lost_peer(error) else 1
    return next((code for kind, _, code in KINDS if isinstance(ours, kind)), other)


def _in_our_words(error: BaseException) -> BaseException:
    """Return the user's error that one of the system is (``USERS_MATTER``), or else ``error``."""
    if isinstance(error, OSError) and (remedy := USERS_MATTER.get(error.errno or 0)):
        return UserError(
            f"cannot read or write: {error.strerror}",
            where=error.filename or "",
            remedy=remedy,
        )
    if isinstance(error, MemoryError):
        return UserError(
            "memory ran out",
            value=str(error) or "MemoryError",
            remedy="give this process more, or less to hold at once: shorter rows, a smaller batch",
        )
    return error


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
