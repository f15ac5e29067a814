"""Rows of tokens out of corpora of shards: row s of a shard is its tokens [s * L, s * L + L + 1).

L = ``seq_len`` is chosen at train time; neighbouring rows share one token, so that each token is
predicted once.

Shape legend: B rows, L + 1 tokens each (inputs and, one later, labels); n rows asked for, anywhere
in any shards.
"""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfscale.errors import DataError
from hfscale.log import logger
from hfscale.shards.manifest import TEXT, Manifest, ShardEntry
from hfscale.shards.open import open_manifest
from hfscale.shards.reader import ShardReader
from hfscale.stream.prepared import FILLER_ID, Prepared, address_of
from hfscale.stream.state import Cursors

PAGE = 4096  # bytes

if TYPE_CHECKING:  # so that checks on the login node need no torch
    from torch import Tensor

    from hfscale.stream.state import StreamState


@dataclass
class Rows:
    """One micro-batch as it leaves the stream, on the CPU."""

    ids_BL: Tensor  # int64 (B, L + 1)
    # int64, rising: b * L + t where tokens t and t + 1 of row b are of two documents; None: nobody
    # asked
    boundaries: Tensor | None
    valid_B: Tensor  # bool: False marks a filler row, which is not scored
    source_B: Tensor  # int16: which source of the mixture
    # int64 (B,): the row's place in the order of the run (P), or of the validation rows
    position: Tensor

    @property
    def document_ids_BL(self) -> Tensor | None:
        """Documents numbered from 0 within their row (B, L + 1; int32)."""
        if self.boundaries is None:
            return None
        L = self.ids_BL.shape[1] - 1
        begins_BL = self.ids_BL.new_zeros(self.ids_BL.shape)
        begins_BL[self.boundaries // L, self.boundaries % L + 1] = 1
        return begins_BL.cumsum(1).int()


class TokenRows:
    """The rows of the shards of one manifest. Not for two threads at once.

    With ``skip`` a row that touches a damaged chunk is filled with FILLER_ID and reported as not
    valid, where it would else be an error; ``damage`` then has what was found, by (shard, chunk),
    where chunk -1 is the whole shard. Of ``raw`` text ``shard_rows`` counts samples, and only
    ``text.py`` can prepare its rows.

    Raises:
        DataError: if the manifest is missing or damaged, or no shard is as long as a row.
    """

    plan_tokens = 2**25  # at most, of all ranks, that are prepared at once

    def __init__(
        self,
        path: str | Path | Manifest,
        *,
        seq_len: int,
        place: str | Path | None = None,
        verify: bool = True,
        skip: bool = False,
    ) -> None:
        """``place`` is what the user calls a manifest that is open already."""
        self.manifest = path if isinstance(path, Manifest) else open_manifest(path)
        self.manifests = [self.manifest]
        self.first_shards = np.array([0])  # of each manifest, shards numbered through
        self.raw = self.manifest.dtype == TEXT
        self.seq_len, self.verify, self.skip = seq_len, verify, skip
        self.damage: dict[tuple[int, int], DataError] = {}
        rows = [
            shard.documents if self.raw else max(0, shard.tokens - 1) // seq_len
            for shard in self.manifest.shards
        ]
        self.shard_rows = np.array(rows, dtype=np.int64)
        if not self.raw and not self.shard_rows.any():
            longest = max((shard.tokens for shard in self.manifest.shards), default=0)
            raise DataError(
                "no shard is as long as a row" if longest else "an empty source: it has no tokens",
                where=place or path,
                value=longest,
                remedy=f"a row is data.seq_len + 1 = {seq_len + 1} tokens: give more text or a "
                "smaller data.seq_len",
            )
        dtype = "<u4" if self.raw else self.manifest.numpy_dtype
        self._filler = np.full(seq_len + 1, FILLER_ID, dtype)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        # (shard, chunk): read for the rows that were prepared last
        self._near = set[tuple[int, int]]()
        self._most_open = max(16, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))

    @classmethod
    def joined(cls, parts: Sequence[TokenRows]) -> TokenRows:
        """Return the rows of several corpora as of one: shards are numbered through, and one limit
        holds for all open files.
        """
        rows = copy(parts[0])
        rows.manifests = [part.manifest for part in parts]
        rows.first_shards = np.cumsum([0, *(len(part.shard_rows) for part in parts[:-1])])
        rows.shard_rows = np.concatenate([part.shard_rows for part in parts])
        rows._filler = max((part._filler for part in parts), key=lambda filler: filler.itemsize)
        rows._open, rows.damage = OrderedDict(), {}
        return rows

    def source_of(self, shards: np.ndarray) -> np.ndarray:
        """Return which of the joined corpora each of the shards (n) belongs to."""
        return np.searchsorted(self.first_shards, shards, side="right") - 1

    def shard(self, number: int) -> tuple[Manifest, ShardEntry]:
        """Return a shard's entry, and the manifest that it stands in."""
        source = int(self.source_of(np.array(number)))
        manifest = self.manifests[source]
        return manifest, manifest.shards[number - int(self.first_shards[source])]

    @property
    def fingerprint(self) -> str:
        """What names the data: the digest of its manifest (the first one's)."""
        return self.manifest.fingerprint

    def prepare(
        self,
        shards: np.ndarray,
        rows: np.ndarray,
        *,
        documents_per: int = 0,
        positions: np.ndarray | None = None,
        left_out: np.ndarray | None = None,
    ) -> Prepared:
        """Return row ``rows[k]`` of shard ``shards[k]``, for each k of n, ready to be copied: read
        from disk and verified.

        ``documents_per`` is the number of rows of a micro-batch for which ``Rows.boundaries`` are
        wanted; 0: not at all. ``positions`` (n) are those in the run, which matter to raw text
        only. Fillers come for rows that are ``left_out`` (n; bool): they are not read, and not
        valid. What is missing or damaged stops ``Prepared.fill`` at the first row that needs it,
        unless it is to be skipped.
        """
        L = self.seq_len
        preparing = _Preparing(self._filler, starts=rows * L, most_maps=self._most_open // 3)
        near = set[tuple[int, int]]()
        kept = np.arange(len(rows)) if left_out is None else np.flatnonzero(~left_out)
        for of_kept, shard in _by_shard(shards[kept], rows[kept]):
            at = kept[of_kept]
            try:
                reader = self._reader(shard)
            except DataError as error:
                self.note(shard, -1, error)
                preparing.block(at, error)
                continue
            preparing.valid[at] = True
            first, last = reader.chunks_of(rows[at] * L), reader.chunks_of(rows[at] * L + L)
            touched = list[int]()
            for chunk in _touched(first, last):
                try:
                    tokens, _ = reader.chunk(chunk)
                except DataError as error:
                    self.note(shard, chunk, error)
                    preparing.block(at[(first <= chunk) & (chunk <= last)], error)
                    continue
                if (shard, chunk) not in self._near:
                    # waits for the disk here, not where the rows are copied
                    tokens[:: PAGE // tokens.itemsize].max()
                near.add((shard, chunk))
                touched.append(chunk)
            preparing.place(at, reader, first, last)
            if documents_per:
                preparing.find_documents(at, reader.ends_in(touched))
        self._near = near
        return Prepared(
            preparing.address,
            preparing.maps + preparing.copies,
            length=L + 1,
            valid=preparing.valid,
            source=self.source_of(shards),
            boundaries=preparing.boundaries(documents_per) if documents_per else [],
            blocked={} if self.skip else preparing.blocked,
        )

    def fill(self, shards: np.ndarray, rows: np.ndarray, ids_BL: np.ndarray) -> np.ndarray:
        """Return which rows are valid (n; bool), with ``ids_BL[k]`` (n, L + 1; any integer dtype)
        filled with row ``rows[k]`` of shard ``shards[k]``.

        Raises:
            DataError: if a shard is missing or damaged and is not to be skipped; it names shard,
                member and offset.
        """
        prepared = self.prepare(shards, rows)
        prepared.fill(slice(0, len(shards)), ids_BL)
        return prepared.valid

    def locate(self, shard: int, row: int) -> tuple[str, int, str, tuple[int, int]]:
        """Return the name of a row's shard, its first token there, and the member and the first
        and last of the documents that it is of.
        """
        manifest, entry = self.shard(shard)
        first = row * self.seq_len
        with manifest.local(entry):  # the row was verified when it was read
            reader = ShardReader(manifest.folder, entry, dtype=manifest.numpy_dtype, verify=False)
        member, begins = reader.locate(first)
        _, ends = reader.locate(first + self.seq_len - 1)
        return entry.name, first, member, (begins, ends)

    def wanted(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """Return what tells which shards are wanted, given those of rows (n) and how many steps
        ahead these are.
        """
        return lambda shards, ahead: shards

    def advance(self, consumed: int) -> None:
        """Return with ``consumed`` rows of the run noted: nothing to do where the order alone says
        which rows those were.
        """

    def rewind(self, state: StreamState) -> None:
        """Return with nothing done, for the same reason."""

    def record(self) -> Cursors:
        """Return what the state of a stream must hold of its rows: only raw text has something to
        say.
        """
        return []

    def close(self) -> None:
        """Return with nothing left that works for these rows: what prepares them may end in an
        error.
        """
        for remote in [manifest.remote for manifest in self.manifests if manifest.remote]:
            remote.cancelled.set()

    def note(self, shard: int, chunk: int, error: DataError) -> None:
        """Log damage that is to be skipped when it is first met."""
        if self.skip and (shard, chunk) not in self.damage:
            self.damage[shard, chunk] = error
            logger.warning(f"rows are skipped: {error.what} ({error.where})")

    def _reader(self, shard: int) -> ShardReader:
        """Return the open shard; the one that was not used for the longest time is closed to make
        room.
        """
        if (shard, -1) in self.damage:
            # to look for it on a server again would cost its patience again
            raise self.damage[shard, -1]
        if shard not in self._open:
            if len(self._open) >= self._most_open:
                self._open.popitem(last=False)
            manifest, entry = self.shard(shard)
            for gone in [
                number
                for number, reader in self._open.items()
                if manifest.remote and not reader.path.exists()
            ]:
                del self._open[gone]  # the cache has removed it, and gets its room with this
            with manifest.local(entry):
                self._open[shard] = ShardReader(
                    manifest.folder,
                    entry,
                    dtype=manifest.numpy_dtype,
                    verify=self.verify,
                    partial=self.skip,
                )
        self._open.move_to_end(shard)
        return self._open[shard]


def _by_shard(shards: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Yield which of n rows are of one shard, in the order in which they lie there, and the
    shard.
    """
    order = np.argsort(shards << 40 | rows)
    cuts = np.flatnonzero(np.diff(shards[order], prepend=-1, append=-1)).tolist()
    for begin, end in pairwise(cuts):
        yield order[begin:end], int(shards[order[begin]])


def _touched(first: np.ndarray, last: np.ndarray) -> list[int]:
    """Return the chunks that rows from chunk ``first[k]`` to ``last[k]`` touch."""
    rise = np.bincount(first, minlength=last.max() + 2) - np.bincount(last + 1)
    chunks: list[int] = np.flatnonzero(np.cumsum(rise)).tolist()
    return chunks


class _Preparing:
    """Where n rows lie in memory, found shard after shard; ``starts`` (n) are their first tokens,
    counted in their shards.
    """

    def __init__(self, filler: np.ndarray, *, starts: np.ndarray, most_maps: int) -> None:
        n = len(starts)
        self._filler, self._starts, self._most_maps = filler, starts, most_maps
        self._length = len(filler) - 1
        self.address = np.full(n, address_of(filler))
        self.valid = np.zeros(n, dtype=bool)
        self.blocked: dict[int, DataError] = {}
        self.maps, self.copies = [filler], list[np.ndarray]()
        self._ends = [np.empty(0, np.int64)]  # where documents end, shard after shard
        self._first_end, self._last_end = np.zeros((2, n), dtype=np.int64)  # of each row, there

    def block(self, at: np.ndarray, error: DataError) -> None:
        """Note that rows ``at`` cannot be had."""
        self.valid[at] = False
        self.blocked |= dict.fromkeys(at.tolist(), error)

    def place(
        self, at: np.ndarray, reader: ShardReader, first: np.ndarray, last: np.ndarray
    ) -> None:
        """Take rows ``at`` from the shard's own memory; a copy of what goes on in another chunk, or
        has narrower ids than other sources.
        """
        there = address_of(reader.memory) + reader.indices(self._starts[at], first)
        self.address[at] = np.where(self.valid[at], there, self.address[at])
        alike = reader.memory.itemsize == self._filler.itemsize
        direct = alike and len(self.maps) < self._most_maps  # each is an open file
        if direct:
            self.maps.append(reader.memory)
        for k in at[self.valid[at] & ((first < last) | (not direct))].tolist():
            copy_of_row = np.empty_like(self._filler)
            start = int(self._starts[k])
            reader.read_tokens(start, start + self._length + 1, copy_of_row)
            self.copies.append(copy_of_row)
            self.address[k] = address_of(copy_of_row)

    def find_documents(self, at: np.ndarray, ends: np.ndarray) -> None:
        """Note which of the shard's ``ends`` of documents lie in rows ``at``."""
        before, starts = sum(map(len, self._ends)), self._starts[at]
        self._ends.append(ends)
        self._first_end[at] = before + np.searchsorted(ends, starts, side="right")
        self._last_end[at] = before + np.searchsorted(ends, starts + self._length, side="right")

    def boundaries(self, documents_per: int) -> list[np.ndarray]:
        """Return ``Rows.boundaries`` of each ``documents_per`` rows."""
        n, L = len(self._starts), self._length
        count = np.where(self.valid, self._last_end - self._first_end, 0)  # begin within each row
        stops, row = np.cumsum(count), np.repeat(np.arange(n), count)
        number = np.arange(len(row)) + (self._first_end - stops + count)[row]
        begin = np.concatenate(self._ends)[number]
        begin += (np.arange(n) % documents_per * L - 1 - self._starts)[row]
        cuts = [0, *stops[documents_per - 1 :: documents_per].tolist()]
        return [begin[first:last] for first, last in pairwise(cuts)]
