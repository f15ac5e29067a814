"""What a run says: plain lines on stderr, from rank 0; other ranks speak only to warn, and say who
they are.

stdout is left to results (predictions, resolved configs), so that they can be piped.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import TYPE_CHECKING

from hfscale.errors import shown

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_S = (
    30.0  # between lines of progress where no bar can be drawn: in a log, and of several processes
)

logger = logging.getLogger("hfscale")


def setup(*, rank: int = 0) -> None:
    """Send ``logger``'s lines to this process's stderr; calling it again replaces the handler."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Shown("%(asctime)s " + (f"[rank {rank}] " if rank else "") + "%(message)s", "%H:%M:%S")
    )
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = (
        False  # libraries configure the root logger as they please; our lines must not appear twice
    )


def progress_bar(title: str, total: int | None, *, unit: str = "B") -> tqdm:
    """Return a tqdm bar on stderr; where that is no terminal, a line each half minute; without a
    ``title`` nothing.

    A ``total`` of None is not known.
    """
    from tqdm import tqdm

    lines: dict[str, object] = (
        {}
        if sys.stderr.isatty()
        else {
            "file": _Lines(),
            "mininterval": LINE_S,
            "delay": LINE_S,
            "miniters": 1,
            "leave": False,
            "bar_format": "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, left {remaining}",
        }
    )
    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        disable=not title,
        dynamic_ncols=True,
        **lines,
    )


class _Shown(logging.Formatter):
    """Names and messages of others are part of a line, and never one of their own."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), lines=True)


class _Lines(io.StringIO):
    """What a bar writes, as lines of the log."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.info(text.strip())
        return len(text)
