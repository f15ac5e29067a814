"""Rows of tokens out of corpora of shards: row s of a shard is its tokens [s * L, s * L + L + 1).

L = ``seq_len`` is chosen at train time; neighbouring rows share one token, so that each token is predicted once.

Shape legend: B rows, L + 1 tokens each (inputs and, one later, labels); n rows asked for, anywhere in any shards.
"""
from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfscale.errors import DataError
from hfscale.log import logger
from hfscale.shards.manifest import TEXT, Manifest, ShardEntry
from hfscale.shards.reader import ShardReader

FILLER_ID = 0  # of the tokens of a row that is skipped: an id that every vocabulary has

if TYPE_CHECKING:  # so that checks on the login node need no torch
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One micro-batch as it leaves the stream, on the CPU."""

    ids_BL: Tensor  # int64 (B, L + 1)
    document_ids_BL: Tensor | None  # int32 (B, L + 1): documents numbered from 0 within their row; None where nobody asked
    valid_B: Tensor  # bool: False marks a filler row, which is not scored
    source_B: Tensor  # int16: which source of the mixture
    position: Tensor  # int64 (B,): the row's place in the order of the run (P), or of the validation rows


class TokenRows:
    """The rows of the shards of one manifest. Not for two threads at once.

    With ``skip`` a row that touches a damaged chunk is filled with FILLER_ID and reported as not valid, where it would else be an error;
    ``damage`` then has what was found, by (shard, chunk), where chunk -1 is the whole shard.

    Raises:
        DataError: if the manifest is missing or damaged, is of raw text, or no shard is as long as a row.
    """

    def __init__(self, path: str | Path, *, seq_len: int, verify: bool = True, skip: bool = False) -> None:
        self.manifest = Manifest.load(path)
        self.manifests = [self.manifest]
        self._first_shards = np.array([0])  # of each manifest, shards numbered through
        if self.manifest.dtype == TEXT:
            raise DataError("these are shards of raw text, not of tokens", where=path,
                            remedy="make token shards of them: `hfscale shards build CONFIG`")
        self.seq_len, self._verify, self._skip = seq_len, verify, skip
        self.damage: dict[tuple[int, int], DataError] = {}
        self.shard_rows = np.array([max(0, shard.tokens - 1) // seq_len for shard in self.manifest.shards], dtype=np.int64)
        if not self.shard_rows.any():
            longest = max((shard.tokens for shard in self.manifest.shards), default=0)
            raise DataError("no shard is as long as a row", where=path, value=longest,
                            remedy=f"a row is data.seq_len + 1 = {seq_len + 1} tokens: give more text or a smaller data.seq_len")
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._most_open = max(16, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))

    @classmethod
    def joined(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """Return the rows of several corpora as of one: shards are numbered through, and one limit holds for all open files."""
        rows = copy(parts[0])
        rows.manifests = [part.manifest for part in parts]
        rows._first_shards = np.cumsum([0, *(len(part.shard_rows) for part in parts[:-1])])
        rows.shard_rows = np.concatenate([part.shard_rows for part in parts])
        rows._open, rows.damage = OrderedDict(), {}
        return rows

    def source_of(self, shards: np.ndarray) -> np.ndarray:
        """Return which of the joined corpora each of the shards (n) belongs to."""
        return np.searchsorted(self._first_shards, shards, side="right") - 1

    def shard(self, number: int) -> tuple[Manifest, ShardEntry]:
        """Return a shard's entry, and the manifest that it stands in."""
        source = int(self.source_of(np.array(number)))
        manifest = self.manifests[source]
        return manifest, manifest.shards[number - int(self._first_shards[source])]

    @property
    def fingerprint(self) -> str:
        """What names the data: the digest of its manifest (the first one's)."""
        return self.manifest.fingerprint

    def fill(self, shards: np.ndarray, rows: np.ndarray, ids_BL: np.ndarray) -> np.ndarray:
        """Return which rows are valid (n; bool), with ``ids_BL[k]`` (n, L + 1; any integer dtype) filled with row ``rows[k]`` of shard
        ``shards[k]``.

        Raises:
            DataError: if a shard is missing or damaged and is not to be skipped; it names shard, member and offset.
        """
        valid = np.zeros(len(shards), dtype=bool)
        for reader, at in self._by_shard(shards, rows):
            reader.read_rows(rows[at] * self.seq_len, ids_BL, at)
            valid[at] = True
        ids_BL[np.flatnonzero(~valid)] = FILLER_ID
        return valid

    def fill_document_ids(self, shards: np.ndarray, rows: np.ndarray, ids_BL: np.ndarray) -> None:
        """Return with ``ids_BL[k]`` (n, L + 1; int32) filled with the number of its document in that row, counted from 0."""
        length = self.seq_len + 1
        if self._skip:
            ids_BL[:] = 0
        for reader, at in self._by_shard(shards, rows):
            starts, row_starts = rows[at] * self.seq_len, np.arange(len(at)) * length  # in the shard; in the rows laid end to end
            ends = reader.ends(int(starts.min()), int(starts.max()) + self.seq_len)
            first, last = np.searchsorted(ends, starts, side="right"), np.searchsorted(ends, starts + self.seq_len, side="right")
            begun = last - first  # documents that begin within each row
            begins = ends[np.repeat(first, begun) + _count_up(begun)] + np.repeat(row_starts - starts, begun)
            edges = np.sort(np.concatenate([row_starts, begins]))
            numbers = _count_up(begun + 1).astype(np.int32)
            ids_BL[at] = np.repeat(numbers, np.diff(edges, append=len(at) * length)).reshape(-1, length)

    def close(self) -> None:
        """Return with every shard closed."""
        self._open.clear()

    def _by_shard(self, shards: np.ndarray, rows: np.ndarray) -> Iterator[tuple[ShardReader, np.ndarray]]:
        """Yield each shard's reader with the places in ``shards`` that name it, less those whose rows are skipped."""
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order], prepend=-1, append=-1)).tolist()
        for first, last in pairwise(cuts):
            shard, at = int(shards[order[first]]), order[first:last]
            if not self._skip:
                yield self._reader(shard), at
            elif (whole := self._whole(shard, rows[at])).any():
                yield self._reader(shard), at[whole]

    def _whole(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Return which ``rows`` of a shard touch no damaged chunk (bool); damage is noted and logged when it is first met."""
        if (shard, -1) in self.damage:
            return np.zeros(len(rows), dtype=bool)
        try:
            reader = self._reader(shard)
            whole, found = reader.whole(rows * self.seq_len, self.seq_len + 1), reader.bad
        except DataError as error:
            whole, found = np.zeros(len(rows), dtype=bool), {-1: error}
        for chunk, damage in found.items():
            if (shard, chunk) not in self.damage:
                self.damage[shard, chunk] = damage
                logger.warning(f"rows are skipped: {damage.what} ({damage.where})")
        return whole

    def _reader(self, shard: int) -> ShardReader:
        """Return the open shard; the one that was not used for the longest time is closed to make room."""
        if shard not in self._open:
            if len(self._open) >= self._most_open:
                self._open.popitem(last=False)
            manifest, entry = self.shard(shard)
            self._open[shard] = ShardReader(manifest.folder, entry, dtype=manifest.numpy_dtype, verify=self._verify, partial=self._skip)
        self._open.move_to_end(shard)
        return self._open[shard]


def _count_up(counts: np.ndarray) -> np.ndarray:
    """Return 0, 1, ..., c - 1 for each c of ``counts``, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
