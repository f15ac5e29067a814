"""Files of JSON lines that a run appends to, and that a kill can tear at the end only.

    RUN_DIR/metrics.jsonl     what was measured, one line a logged step
    RUN_DIR/details.jsonl     what only pictures need: tags of TensorBoard and their numbers
    RUN_DIR/incidents.jsonl   what was wrong with a step, and what was done about it
    RUN_DIR/goodput.jsonl     where the time of each attempt went
    RUN_DIR/exports.jsonl     which step was exported to where
    RUN_DIR/samples.jsonl     what the model wrote (metrics.samples)

One unbuffered write a line; the next attempt cuts off a torn one before it appends.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import TypeVar

from hfscale.errors import CheckpointError, DataError
from hfscale.log import logger
from hfscale.monitor.fence import Fence
from hfscale.records import Damaged, Record, open_file, parse, read_file

R = TypeVar("R", bound=Record)
MOST_BYTES = 1 << 34


class Lines:
    """One such file, opened to append. On rank 0 only: a ``fence`` keeps older attempts out."""

    def __init__(self, path: Path, *, fence: Fence | None = None) -> None:
        """Open ``path``, without what a kill has torn.

        Raises:
            SupersededError: if a younger attempt has begun.
            CheckpointError: if the last line is whole and no record.
        """
        self._fence = fence
        if fence is not None:
            fence.check()  # before a torn line is cut off: it may be the younger one's
        self.last = _repair(path)  # the last line of before; b"" if there is none
        self._file = open(path, "ab", buffering=0)

    def append(self, record: Mapping[str, object]) -> None:
        """Write ``record``; a number in it that is not finite becomes null.

        Raises:
            SupersededError: if a younger attempt has begun; nothing is written then.
            OSError: if the disk has no room for the whole line; nothing is left of it.
        """
        if self._fence is not None:
            self._fence.check()
        line = json.dumps(finite(record), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        begins = self._file.seek(0, os.SEEK_END)
        if self._file.write(line) != len(line):  # a disk that is nearly full takes a part
            self._file.truncate(begins)  # or the next record would be glued to it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file.name))

    def close(self) -> None:
        """Close the file, once the disk has it."""
        os.fsync(self._file.fileno())
        self._file.close()


def finite(value: object) -> object:
    """Return ``value`` with null for each number in it that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value


def read_lines(path: Path, kind: type[R], *, last_bytes: int | None = None) -> Iterator[R]:
    """Yield the records of ``path`` in their order, but for what a kill has torn; none if there is
    no such file.

    With ``last_bytes`` only those that lie in them as a whole.

    Raises:
        DataError: if a line is JSON, but no record of this ``kind``.
    """
    if not path.is_file():
        return
    with open_file(path) as file:
        begins = max(0, path.stat().st_size - last_bytes) if last_bytes else 0
        file.seek(begins)
        torn = 0  # by a kill, which is the last one; by what else, if others follow?
        for number, line in enumerate(file, start=1):
            if torn and not (torn == 1 and begins):
                logger.warning(f"{path}:{torn} is no record: it is left out")
            torn = 0
            try:
                yield parse(kind, line)
            except Damaged as error:
                if str(error).startswith("not JSON"):
                    torn = number
                else:
                    raise DataError(
                        f"a record of the run is damaged: {error}",
                        where=path if begins else f"{path}:{number}",
                        remedy="remove that line: the run itself does not need it",
                    ) from None


def _repair(path: Path) -> bytes:
    """Return the last whole line of ``path``, after cutting off one that a kill left torn."""
    if not path.exists():
        return b""
    content = read_file(path, most=MOST_BYTES)
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    last = content[:whole].rstrip(b"\n").rpartition(b"\n")[2]
    try:
        if last:
            parse(Record, last)
    except Damaged:
        raise CheckpointError(
            "the last line of the run's records is damaged",
            where=path,
            value=last[:80].decode(errors="replace"),
            remedy="remove that line, or move the file away: the run itself does not need it",
        ) from None
    return last
