"""One token shard as an array: any range of tokens, and where documents end, straight from the page
cache.

Positions are token positions in the shard. Each chunk's checksum is checked once, when it is first
touched.
"""

from __future__ import annotations

import mmap
import tarfile
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from hfscale.errors import DataError
from hfscale.records import open_file
from hfscale.shards.index import ShardIndex
from hfscale.shards.manifest import ShardEntry


class ShardReader:
    """A memory-mapped shard. Opening reads the index only; a thread may read while another reads.

    ``partial`` is for what is left of a damaged shard: one that was cut short is opened too.

    Raises:
        DataError: if tar or index are missing, do not belong together, or have another size than
            the manifest says.
    """

    def __init__(
        self,
        folder: str | Path,
        entry: ShardEntry,
        *,
        dtype: np.dtype[np.generic],
        verify: bool = True,
        partial: bool = False,
    ) -> None:
        self.path, self.entry = Path(folder) / entry.name, entry
        self._dtype, self._verify = np.dtype(dtype), verify
        index = ShardIndex.load(Path(folder) / entry.index_name)
        if index.tar_digest != entry.digest:
            raise self._damage("the index belongs to another shard than the manifest names")
        try:
            with open_file(self.path) as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with suppress(AttributeError, OSError):  # Linux may be built without
                    # what is read from disk comes in pages of 2 MiB
                    self._map.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, ValueError) as error:
            raise self._damage(
                f"the shard cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        if len(self._map) != entry.bytes and not partial:
            raise self._damage(
                f"the shard has {len(self._map):,} bytes, its manifest says {entry.bytes:,}"
            )
        if problem := index.problem(entry.bytes):
            raise self._damage(problem)
        self._ends, self._tokens = index.ends, index.tokens
        # first token of each chunk, and the end
        self._starts: list[int] = [
            0,
            *np.cumsum(self._tokens["tokens"], dtype=np.int64).tolist(),
        ]
        self._chunk_starts = np.array(self._starts)
        payloads = self._tokens["offset"].astype(np.int64) // self._dtype.itemsize
        # from a position in the shard to one in the tar, in tokens
        self._shifts = payloads - self._chunk_starts[:-1]
        self._first_documents: list[int] = [
            0,
            *np.cumsum(self._ends["documents"], dtype=np.int64).tolist(),
        ]
        if self._starts[-1] != entry.tokens or self._first_documents[-1] != entry.documents:
            raise self._damage(
                f"the index counts {self._starts[-1]:,} tokens in "
                f"{self._first_documents[-1]:,} documents, "
                f"the manifest {entry.tokens:,} in {entry.documents:,}"
            )
        if (self._tokens["bytes"] != self._tokens["tokens"] * self._dtype.itemsize).any():
            raise self._damage(
                f"the manifest says {self._dtype.name}, but the chunks have another number of "
                "bytes a token"
            )
        self._chunks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # the tar, as if it were all tokens
        self.memory = np.frombuffer(self._map, self._dtype, len(self._map) // self._dtype.itemsize)

    def __len__(self) -> int:
        return self.entry.tokens

    def read_tokens(self, start: int, stop: int, out: np.ndarray) -> None:
        """Return with ``out`` (stop - start,) filled with tokens [start, stop), converted to its
        dtype without a copy between.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of a shard with {len(self)}")
        chunk = bisect_right(self._starts, start) - 1
        position = start
        while position < stop:
            (tokens, _), first = self.chunk(chunk), self._starts[chunk]
            part = min(stop, self._starts[chunk + 1])
            out[position - start : part - start] = tokens[position - first : part - first]
            position, chunk = part, chunk + 1

    def chunks_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the chunk (n) that holds each of the token ``positions`` (n)."""
        chunks: np.ndarray = np.searchsorted(self._chunk_starts, positions, side="right") - 1
        return chunks

    def indices(self, positions: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """Return where in ``memory`` the tokens at ``positions`` (n) lie, each in its chunk (n)."""
        indices: np.ndarray = positions + self._shifts[chunks]
        return indices

    def chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a chunk, and where in it documents end (uint32); both are verified
        when they are first asked for.
        """
        if number not in self._chunks:
            member = self._ends[number]
            name = member_name(number, "ends.npy")
            payload = self._payload(member, name)
            tokens = self._payload(self._tokens[number], member_name(number, "tokens.bin"))
            tokens = tokens.view(self._dtype)
            ends = payload[npy_header(payload) :]
            if len(ends) != 4 * int(member["documents"]):
                raise self._damage(
                    f"member {name} holds {len(ends):,} bytes of ends, the index says "
                    f"{member['documents']:,} documents"
                )
            ends = ends.view("<u4")
            if not rising(ends, len(tokens)):
                raise self._damage(
                    f"the document ends of member {name} do not rise within the chunk"
                )
            if self._verify and (largest := int(tokens.max(initial=0))) > self.entry.max_id:
                raise self._damage(
                    f"chunk {number} holds the id {largest:,}, the manifest says max_id "
                    f"{self.entry.max_id:,}"
                )
            self._chunks[number] = (tokens, ends)
        return self._chunks[number]

    def ends_in(self, chunks: Iterable[int]) -> np.ndarray:
        """Return the document ends in ``chunks``, in order: int64, each the position after a
        document's last token.
        """
        return np.concatenate(
            [
                np.empty(0, np.int64),
                *(self.chunk(chunk)[1] + self._chunk_starts[chunk] for chunk in chunks),
            ]
        )

    def ends(self) -> np.ndarray:
        """Return all document ends in the shard, as ``ends_in``."""
        return self.ends_in(range(len(self._tokens)))

    def locate(self, position: int) -> tuple[str, int]:
        """Return the name of the member that holds token ``position``, and the number of its
        document in the shard.

        The document that another shard began is number 0.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"token {position} of a shard with {len(self)}")
        chunk = bisect_right(self._starts, position) - 1
        before = int(
            np.searchsorted(self.chunk(chunk)[1], position - self._starts[chunk], side="right")
        )
        return member_name(chunk, "tokens.bin"), self._first_documents[chunk] + before

    def _payload(self, member: np.void, name: str) -> np.ndarray:
        offset, size = int(member["offset"]), int(member["bytes"])
        place = f"member {name} at offset {offset:,} ({size:,} bytes)"
        if offset + size > len(self._map):
            raise self._damage(f"{place} is cut off: the shard ends at {len(self._map):,}")
        payload = np.frombuffer(self._map, np.uint8, size, offset)
        if self._verify:
            if xxhash.xxh3_64_intdigest(payload.data) != int(member["checksum"]):
                raise self._damage(f"{place} does not match its checksum")
            # we need none, but every other reader of the tar does
            header = self._map[offset - tarfile.BLOCKSIZE : offset]
            # POSIX ustar
            if header[148:154] != b"%06o" % (sum(header) - sum(header[148:156]) + 8 * ord(" ")):
                raise self._damage(f"the header of {place} is damaged: bad checksum")
        return payload

    def _damage(self, what: str) -> DataError:
        remedy = (
            "restore the shard from a copy or build it again; `hfscale shards verify` "
            "lists all damage"
        )
        return DataError(what, where=self.path, remedy=remedy)


def npy_header(payload: np.ndarray) -> int:
    """Return how many bytes of an ``.npy`` come before its numbers (NumPy's format, version 1)."""
    return min(len(payload), 10 + int.from_bytes(payload[8:10].tobytes(), "little"))


def rising(ends: np.ndarray, tokens: int) -> bool:
    """Return whether ``ends`` are positions after documents of at least one token each, in a chunk
    of ``tokens``.
    """
    return not len(ends) or bool(
        ends[0] > 0 and ends[-1] <= tokens and (ends[1:] > ends[:-1]).all()
    )


def member_name(chunk: int, part: str) -> str:
    """Return the name in the tar of a ``part`` ("tokens.bin" or "ends.npy") of a chunk."""
    return f"{chunk:09d}.{part}"
