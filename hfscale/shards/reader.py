"""One token shard as an array: any range of tokens, and where documents end, straight from the page cache.

Positions are token positions in the shard. Each chunk's checksum is checked once, when it is first touched.
"""
from __future__ import annotations

import mmap
import tarfile
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hfscale.errors import DataError
from hfscale.shards.index import ShardIndex
from hfscale.shards.manifest import ShardEntry

FEW_ROWS = 6  # below which a gather costs more than it saves
GATHERED_ROWS = 64  # at once: what is between map and output stays in the cache


class ShardReader:
    """A memory-mapped shard. Opening reads the index only; a thread may read while another reads.

    ``partial`` is for what is left of a damaged shard: one that was cut short is opened too, and ``ends`` leaves out what it cannot read.

    Raises:
        DataError: if tar or index are missing, do not belong together, or have another size than the manifest says.
    """

    def __init__(self, folder: str | Path, entry: ShardEntry, *, dtype: np.dtype[Any], verify: bool = True, partial: bool = False) -> None:
        self.path, self.entry = Path(folder) / entry.name, entry
        self._dtype, self._verify, self._partial = np.dtype(dtype), verify, partial
        index = ShardIndex.load(Path(folder) / entry.index_name)
        if index.tar_digest != entry.digest:
            raise self._damage("the index belongs to another shard than the manifest names")
        try:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._damage(f"the shard cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if len(self._map) != entry.bytes and not partial:
            raise self._damage(f"the shard has {len(self._map):,} bytes, its manifest says {entry.bytes:,}")
        self._ends, self._tokens = index.ends, index.tokens
        self._starts: list[int] = [0, *np.cumsum(self._tokens["tokens"], dtype=np.int64).tolist()]  # first token of each chunk, and the end
        self._chunk_starts = np.array(self._starts)
        payloads = self._tokens["offset"].astype(np.int64) // self._dtype.itemsize
        self._shifts = payloads - self._chunk_starts[:-1]  # from a position in the shard to one in the tar, in tokens
        self._first_documents: list[int] = [0, *np.cumsum(self._ends["documents"], dtype=np.int64).tolist()]
        if self._starts[-1] != entry.tokens or self._first_documents[-1] != entry.documents:
            raise self._damage(f"the index counts {self._starts[-1]:,} tokens in {self._first_documents[-1]:,} documents, "
                               f"the manifest {entry.tokens:,} in {entry.documents:,}")
        if (self._tokens["bytes"] != self._tokens["tokens"] * self._dtype.itemsize).any():
            raise self._damage(f"the manifest says {self._dtype.name}, but the chunks have another number of bytes a token")
        self._token_views: list[np.ndarray | None] = [None] * len(self._tokens)
        self._end_views: list[np.ndarray | None] = [None] * len(self._ends)
        self.bad: dict[int, DataError] = {}  # the damaged chunks that `whole` has come across

    def __len__(self) -> int:
        return self.entry.tokens

    def read_tokens(self, start: int, stop: int, out: np.ndarray) -> None:
        """Return with ``out`` (stop - start,) filled with tokens [start, stop), converted to its dtype without a copy between."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of a shard with {len(self)}")
        chunk = bisect_right(self._starts, start) - 1
        position = start
        while position < stop:
            tokens, first = self._chunk_tokens(chunk), self._starts[chunk]
            part = min(stop, self._starts[chunk + 1])
            out[position - start:part - start] = tokens[position - first:part - first]
            position, chunk = part, chunk + 1

    def read_rows(self, starts: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """Return with row ``at[k]`` of ``out`` (n, length) filled with the ``length`` tokens from ``starts[k]`` on, for every k.

        Rows within one chunk are gathered many at a time, four times as fast as one by one; the others cross into the next chunk.
        """
        length = out.shape[1]
        if len(starts) < FEW_ROWS:
            for start, k in zip(starts.tolist(), at.tolist(), strict=True):
                self.read_tokens(start, start + length, out[k])
            return
        chunks = np.searchsorted(self._chunk_starts, starts, side="right") - 1
        for chunk in set(chunks.tolist()):
            self._chunk_tokens(chunk)  # its checksum
        inside = starts + length <= self._chunk_starts[chunks + 1]
        for k in np.flatnonzero(~inside).tolist():
            self.read_tokens(int(starts[k]), int(starts[k]) + length, out[at[k]])
        size = self._dtype.itemsize
        windows = np.ndarray((len(self._map) // size - length + 1, length), self._dtype, self._map, strides=(size, size))
        offsets, at = (starts + self._shifts[chunks])[inside], at[inside]
        if len(at) > 1 and len(steps := set(np.diff(offsets).tolist())) == 1 and (step := steps.pop()) > 0 and (np.diff(at) == 1).all():
            out[at[0]:at[-1] + 1] = windows[offsets[0]:offsets[-1] + 1:step]  # in order: one slice, converted without a copy between
            return
        for k in range(0, len(at), GATHERED_ROWS):
            out[at[k:k + GATHERED_ROWS]] = windows[offsets[k:k + GATHERED_ROWS]]

    def whole(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return for each k whether the chunks of tokens [starts[k], starts[k] + length) are undamaged; the others are in ``bad``."""
        first = np.searchsorted(self._chunk_starts, starts, side="right") - 1
        last = np.searchsorted(self._chunk_starts, starts + length, side="left")
        spans = [range(*span) for span in zip(first.tolist(), last.tolist(), strict=True)]
        for chunk in {chunk for span in set(spans) for chunk in span} - self.bad.keys():
            try:
                self._chunk_ends(chunk)
                self._chunk_tokens(chunk)
            except DataError as error:
                self.bad[chunk] = error
        return np.array([self.bad.keys().isdisjoint(span) for span in spans] if self.bad else np.ones(len(starts)), dtype=bool)

    def ends(self, start: int, stop: int) -> np.ndarray:
        """Return the document ends e with start < e <= stop: int64, each the position after a document's last token."""
        found = [np.empty(0, np.int64)]
        for chunk in range(bisect_right(self._starts, start) - 1, len(self._ends)):
            if self._starts[chunk] >= stop:
                break
            try:
                found.append(self._chunk_ends(chunk).astype(np.int64) + self._starts[chunk])
            except DataError:
                if not self._partial:
                    raise
        ends = np.concatenate(found)
        low, high = np.searchsorted(ends, (start, stop), side="right")
        return ends[low:high]

    def locate(self, position: int) -> tuple[str, int]:
        """Return the name of the member that holds token ``position``, and the number of its document in the shard.

        The document that another shard began is number 0.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"token {position} of a shard with {len(self)}")
        chunk = bisect_right(self._starts, position) - 1
        before = int(np.searchsorted(self._chunk_ends(chunk), position - self._starts[chunk], side="right"))
        return member_name(chunk, "tokens.bin"), self._first_documents[chunk] + before

    def _chunk_tokens(self, chunk: int) -> np.ndarray:
        view = self._token_views[chunk]
        if view is None:
            view = self._payload(self._tokens[chunk], member_name(chunk, "tokens.bin")).view(self._dtype)
            self._token_views[chunk] = view
        return view

    def _chunk_ends(self, chunk: int) -> np.ndarray:
        view = self._end_views[chunk]
        if view is None:
            member = self._ends[chunk]
            payload = self._payload(member, member_name(chunk, "ends.npy"))
            view = payload[len(payload) - 4 * int(member["documents"]):].view("<u4")  # what follows the .npy header
            self._end_views[chunk] = view
        return view

    def _payload(self, member: np.void, name: str) -> np.ndarray:
        offset, size = int(member["offset"]), int(member["bytes"])
        place = f"member {name} at offset {offset:,} ({size:,} bytes)"
        if offset + size > len(self._map):
            raise self._damage(f"{place} is cut off: the shard ends at {len(self._map):,}")
        payload = np.frombuffer(self._map, np.uint8, size, offset)
        if self._verify:
            if xxhash.xxh3_64_intdigest(payload.data) != int(member["checksum"]):
                raise self._damage(f"{place} does not match its checksum")
            try:  # we need no headers, but every other reader of the tar does
                tarfile.TarInfo.frombuf(self._map[offset - tarfile.BLOCKSIZE:offset], "utf-8", "strict")
            except tarfile.HeaderError as error:
                raise self._damage(f"the header of {place} is damaged: {error}") from None
        return payload

    def _damage(self, what: str) -> DataError:
        remedy = "restore the shard from a copy or build it again; `hfscale shards verify` lists all damage"
        return DataError(what, where=self.path, remedy=remedy)


def member_name(chunk: int, part: str) -> str:
    """Return the name in the tar of a ``part`` ("tokens.bin" or "ends.npy") of a chunk."""
    return f"{chunk:09d}.{part}"
