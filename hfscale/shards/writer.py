"""Token shards: documents in, plain WebDataset tars out, the same bytes for the same documents.

A shard holds a fixed number of tokens, cut anywhere: shard k of a corpus is tokens [k*S, (k+1)*S)
of its stream. So the point at which a killed build continues is the end of its last whole shard,
and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from hfscale.shards.files import write_atomically
from hfscale.shards.index import MEMBER, ShardIndex
from hfscale.shards.manifest import ShardEntry

BLOCK = 512  # of a tar: headers and payloads start at its multiples


class ShardWriter:
    """Cuts one stream of documents into chunks and shards. ``committed`` is called with each shard
    that is on disk.

    A document may cross chunks and shards; it counts where it ends. ``first`` is the number of the
    first shard. ``taken`` is, while ``committed`` runs, how many tokens of the last ``add`` are on
    disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        dtype: np.dtype[np.generic],
        chunk_tokens: int,
        shard_chunks: int,
        committed: Callable[[ShardEntry], None],
        first: int = 0,
    ) -> None:
        self._folder, self._name, self._committed = folder, name, committed
        self._shard_chunks, self._number = shard_chunks, first
        self._buffer = np.empty(chunk_tokens, dtype)
        self._used = self.taken = (
            0  # tokens of the buffer that are filled; of a document that are in it or before it
        )
        self._ends: list[int] = []  # exclusive ends of the documents that end in the buffer
        self._tar: _Tar | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, tokens: np.ndarray) -> None:
        """Return once ``tokens`` (a document, or what is left of it, with its end-of-document id)
        are taken over.
        """
        self.taken = 0
        while True:
            count = min(len(tokens) - self.taken, len(self._buffer) - self._used)
            self._buffer[self._used : self._used + count] = tokens[self.taken : self.taken + count]
            self._used += count
            self.taken += count
            if self.taken == len(tokens):
                break
            self._flush_chunk()
        self._ends.append(self._used)
        if self._used == len(self._buffer):
            self._flush_chunk()

    def close(self) -> None:
        """Return once the last, shorter shard is on disk."""
        if self._used:
            self._flush_chunk()
        if self._tar:
            self._finish_shard()

    def _flush_chunk(self) -> None:
        self._tar = self._tar or _Tar()
        self._tar.add(self._buffer[: self._used], np.array(self._ends, "<u4"))
        self._used, self._ends = 0, []
        if self._tar.chunks == self._shard_chunks:
            self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._tar is not None
        entry = self._tar.save(self._folder / f"{self._name}-{self._number:06d}.tar")
        self._tar = None
        self._number += 1
        self._committed(entry)


class _Tar:
    """One shard, put together in memory, so that what is not whole never comes to disk."""

    def __init__(self) -> None:
        from webdataset.writer import TarWriter  # slow to import

        self._file = io.BytesIO()
        self._writer = TarWriter(
            self._file, user="hfscale", group="hfscale", mtime=0, compress=False, encoder=False
        )
        # webdataset leaves it at tarfile's default, PAX
        self._writer.tarstream.format = tarfile.USTAR_FORMAT
        self._members: list[tuple[int, int, int, int, int]] = []
        self._offset, self._max_id, self.chunks = 0, -1, 0

    def add(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Return once a chunk is in the tar. ``ends`` are relative to the chunk."""
        npy = io.BytesIO()
        np.save(npy, ends)
        # in the order that TarWriter gives them
        payloads = {
            "ends.npy": npy.getvalue(),
            "tokens.bin": tokens.tobytes(),
        }
        self._writer.write({"__key__": f"{self.chunks:09d}", **payloads})
        for payload, n_tokens, n_documents in zip(
            payloads.values(), (0, len(tokens)), (len(ends), 0), strict=True
        ):
            checksum = xxhash.xxh3_64_intdigest(payload)
            self._members.append(
                (self._offset + BLOCK, len(payload), n_tokens, n_documents, checksum)
            )
            self._offset += BLOCK + -(-len(payload) // BLOCK) * BLOCK
        self._max_id = max(self._max_id, int(tokens.max()))
        self.chunks += 1

    def save(self, path: Path) -> ShardEntry:
        """Return the entry of the shard, which is on disk with its index."""
        self._writer.close()
        data = self._file.getbuffer()
        write_atomically(path, data)
        index = ShardIndex(hashlib.sha256(data).hexdigest(), np.array(self._members, MEMBER))
        index.save(path.with_suffix(".idx"))
        return ShardEntry(
            name=path.name,
            bytes=len(data),
            tokens=int(index.tokens["tokens"].sum()),
            documents=int(index.ends["documents"].sum()),
            digest=index.tar_digest,
            max_id=self._max_id,
        )
