"""The ledger of rows that a run leaves out: positions in its order, which train nothing.

Such a row is a filler, as a damaged one is. Positions do not depend on ranks or batches, so neither
does what is left out. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Span = tuple[int, int]  # the first position, and the one after the last


def merged(spans: Iterable[Iterable[int]]) -> list[Span]:
    """Return ``spans`` in order, with those that touch as one."""
    joined = list[Span]()
    for first, stop in sorted((*span,) for span in spans):
        if first == stop:
            continue
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((first, stop))
    return joined


class LeftOut:
    """Merged spans, as a stream asks for them."""

    def __init__(self, spans: Iterable[Iterable[int]] = ()) -> None:
        self.spans = merged(spans)
        # the ledger as one rising line: at an odd place is what lies inside of a span
        self._edges = np.array(self.spans, dtype=np.int64).ravel()

    def __bool__(self) -> bool:
        return bool(self.spans)

    def mask(self, positions: np.ndarray) -> np.ndarray:
        """Return which of ``positions`` (n) are left out (n; bool)."""
        place = np.searchsorted(self._edges, positions, side="right")
        inside: np.ndarray = place % 2 == 1
        return inside

    def count(self, first: int, stop: int) -> int:
        """Return how many of the positions from ``first`` to before ``stop`` are left out."""
        inside = [min(stop, end) - max(first, begin) for begin, end in self.spans]
        return sum(n for n in inside if n > 0)
