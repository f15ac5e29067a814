"""Rows that can be copied at once, and what a stream asks of whatever prepares them.

Shape legend: B rows, L + 1 tokens each; n rows prepared, of L = ``seq_len``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided

from hfscale.errors import DataError
from hfscale.shards.manifest import Manifest
from hfscale.stream.state import Cursors, StreamState

GATHERED_TOKENS = 2**17  # at once: what is between shard and output stays in the cache
FILLER_ID = 0  # of the tokens of a row that is skipped: an id that every vocabulary has


class Prepared:
    """n rows that can be copied at once. Where each row's tokens lie in memory is known: in mapped
    shards, or in arrays made for them.

    So rows of any shards are gathered by one call over one view of all the memory between the
    lowest and the highest of them.
    """

    def __init__(
        self,
        address: np.ndarray,
        held: Sequence[np.ndarray],
        *,
        length: int,
        valid: np.ndarray,
        source: np.ndarray,
        boundaries: Sequence[np.ndarray],
        blocked: Mapping[int, DataError],
    ) -> None:
        self.valid, self.source, self.boundaries, self.blocked = valid, source, boundaries, blocked
        self._held = held  # while they are, addresses are good
        lowest = min(held, key=address_of)
        self._index = address - address_of(lowest)
        self._steps = np.diff(self._index, append=0)
        # where rows stop being equally far apart
        self._breaks = np.cumsum(np.diff(self._steps, prepend=0) != 0)
        self._windows = as_strided(
            lowest, (int(self._index.max()) + 1, length), 2 * lowest.strides, writeable=False
        )

    @classmethod
    def copied(
        cls,
        ids: np.ndarray,
        begins: Sequence[np.ndarray],
        documents_per: int,
        *,
        valid: np.ndarray,
        source: np.ndarray,
        blocked: Mapping[int, DataError],
    ) -> Prepared:
        """Return the rows ``ids`` (n, L + 1), in each of which documents begin at ``begins``
        (n).
        """
        length, per = ids.shape[1], max(1, documents_per)
        flat = [begin - 1 + k % per * (length - 1) for k, begin in enumerate(begins)]
        boundaries = (
            [np.concatenate(flat[k : k + per]) for k in range(0, len(flat), per)]
            if documents_per
            else []
        )
        return cls(
            address_of(ids) + np.arange(len(ids)) * length,
            [ids.reshape(-1)],
            length=length,
            boundaries=boundaries,
            valid=valid,
            source=source,
            blocked=blocked,
        )

    def fill(self, part: slice, ids_BL: np.ndarray) -> None:
        """Return with ``ids_BL`` (B, L + 1; any integer dtype) filled with the B rows of ``part``.

        Raises:
            DataError: if one of them is of a shard that is missing or damaged and not to be
                skipped.
        """
        if self.blocked and (bad := sorted(self.blocked.keys() & range(part.start, part.stop))):
            raise self.blocked[bad[0]]
        first, step = int(self._index[part.start]), int(self._steps[part.start])
        # what lies between farther ones may be `ids_BL`: numpy would copy without end
        near = 0 < step <= ids_BL.shape[1]
        # in order: no copy between
        if len(ids_BL) > 1 and near and self._breaks[part.start] == self._breaks[part.stop - 2]:
            ids_BL[:] = self._windows[first : first + len(ids_BL) * step : step]
            return
        index, rows = self._index[part], max(1, GATHERED_TOKENS // ids_BL.shape[1])
        for k in range(0, len(index), rows):
            ids_BL[k : k + rows] = self._windows[index[k : k + rows]]


class RowSource(Protocol):
    """What gives rows by shard and number."""

    seq_len: int
    shard_rows: np.ndarray  # rows of each shard; samples, where rows are of raw text

    def prepare(
        self,
        shards: np.ndarray,
        rows: np.ndarray,
        *,
        documents_per: int = 0,
        positions: np.ndarray | None = None,
    ) -> Prepared:
        """Return row ``rows[k]`` of shard ``shards[k]``, for each k of n, ready to be copied.

        ``documents_per`` is the number of rows of a micro-batch for which ``Rows.boundaries`` are
        wanted; 0: not at all. ``positions`` (n) are those in the run, by which raw text goes. What
        is missing or damaged stops ``Prepared.fill`` at the first row that needs it, unless it is
        to be skipped.
        """


class RunRows(RowSource, Protocol):
    """The rows of a run, of tokens or of raw text: what a stream asks for step after step."""

    plan_tokens: int  # at most, of all ranks, that are prepared at once
    manifests: list[Manifest]

    def prepare(
        self,
        shards: np.ndarray,
        rows: np.ndarray,
        *,
        documents_per: int = 0,
        positions: np.ndarray | None = None,
        left_out: np.ndarray | None = None,
    ) -> Prepared:
        """Return the rows as every ``RowSource`` does, with fillers for those that are ``left_out``
        (n; bool): they are not read, and not valid.
        """

    @property
    def fingerprint(self) -> str:
        """What names the data: the digest of its manifest (the first one's)."""

    def wanted(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """Return what tells which shards are wanted, given those of rows (n) and how many steps
        ahead these are.
        """

    def advance(self, consumed: int) -> None:
        """Return with ``consumed`` rows of the run noted."""

    def rewind(self, state: StreamState) -> None:
        """Return with the run at ``state`` again; nothing is being prepared meanwhile."""

    def record(self) -> Cursors:
        """Return what the state of a stream must hold of its rows. All ranks call this together."""

    def close(self) -> None:
        """Return with nothing left that works for these rows: what prepares them may end in an
        error.
        """


def address_of(array: np.ndarray) -> int:
    """Return where an array lies in memory, counted in its items."""
    return int(array.__array_interface__["data"][0]) // array.itemsize
