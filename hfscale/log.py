"""What a run says: plain lines on stderr, from rank 0; other ranks speak only to warn, and say who they are.

stdout is left to results (predictions, resolved configs), so that they can be piped.
"""
from __future__ import annotations

import logging
import sys
from typing import Any

logger = logging.getLogger("hfscale")


def setup(*, rank: int = 0) -> None:
    """Send ``logger``'s lines to this process's stderr; calling it again replaces the handler."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s " + (f"[rank {rank}] " if rank else "") + "%(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False  # libraries configure the root logger as they please; our lines must not appear twice


def progress_bar(title: str, total: int | None, *, unit: str = "B") -> Any:
    """Return a tqdm bar on stderr, silent where that is no terminal; a ``total`` of None is not known."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit=unit, unit_scale=unit == "B", disable=None, dynamic_ncols=True)
