"""``NAME-%06d.idx``: where each member of a shard lies, so that a reader needs no tar headers.

A token shard has two members a chunk, ``%09d.ends.npy`` then ``%09d.tokens.bin``; a raw-text shard
one a sample. On disk: magic, SHA-256 of the tar (which shard it belongs to), count, MEMBER records,
XXH3-64 of all before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from hfscale.errors import DataError
from hfscale.records import read_file
from hfscale.shards.files import write_atomically

MAGIC = b"HFSIDX1\n"
MEMBER = np.dtype(
    [
        ("offset", "<u8"),  # of the payload in the tar; a multiple of 512
        ("bytes", "<u8"),  # of the payload
        ("tokens", "<u8"),
        ("documents", "<u8"),  # that end in this chunk
        ("checksum", "<u8"),  # XXH3-64 of the payload
    ]
)
NPY_HEAD = 128  # bytes of the .npy header of a vector
_HEAD = len(MAGIC) + 32 + 8
# of bytes, tokens or documents of a member: sums of them are far from what an int64 holds
MOST = 2**48


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The members of one shard, as a MEMBER array in the order of the tar."""

    tar_digest: str  # SHA-256, hex
    members: np.ndarray

    @property
    def ends(self) -> np.ndarray:
        """The members that hold document ends, one a chunk."""
        return self.members[0::2]

    @property
    def tokens(self) -> np.ndarray:
        """The members that hold token ids, one a chunk."""
        return self.members[1::2]

    def problem(self, tar_bytes: int) -> str:
        """Return what cannot be true of the index of a token shard of so many bytes, or nothing:
        what it counts is there to be read.
        """
        ends, tokens, size = self.ends, self.tokens, np.uint64(tar_bytes)
        if len(ends) != len(tokens):
            return "the index has a chunk without its tokens"
        counts = [self.members[name] for name in ("offset", "bytes", "tokens", "documents")]
        if any((count > size).any() for count in counts):
            return "the index counts more than the shard has bytes"  # and so sums do not wrap
        if (self.members["offset"] + self.members["bytes"] > size).any():
            return "a member of the index ends after the shard"
        if (ends["bytes"] != NPY_HEAD + 4 * ends["documents"]).any():
            return "the index counts other documents than the chunks hold ends"
        return ""

    def save(self, path: Path) -> None:
        """Return once the index is on disk, whole or not at all."""
        body = (
            MAGIC
            + bytes.fromhex(self.tar_digest)
            + np.uint64(len(self.members)).astype("<u8").tobytes()
            + self.members.tobytes()
        )
        write_atomically(path, body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"))

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Return the index at ``path``.

        Raises:
            DataError: if it is missing, truncated or damaged.
        """
        remedy = "restore it from a copy, or build the shards again in another folder"
        try:
            data = read_file(path, most=1 << 32)
        except OSError as error:
            raise DataError(
                f"the index of a shard cannot be read: {error.strerror}", where=path, remedy=remedy
            ) from None
        body, checksum = data[:-8], data[-8:]
        if (
            not data.startswith(MAGIC)
            or xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") != checksum
        ):
            raise DataError("the index of a shard is damaged", where=path, remedy=remedy)
        if problem := _problem(body):
            raise DataError(
                f"the index of a shard is damaged: {problem}", where=path, remedy=remedy
            )
        digest = body[len(MAGIC) : len(MAGIC) + 32].hex()
        return cls(tar_digest=digest, members=np.frombuffer(body, MEMBER, offset=_HEAD))


def _problem(body: bytes) -> str | None:
    """Return what cannot be in an index, whatever its checksum says."""
    if len(body) < _HEAD:
        return f"it has {len(body)} bytes"
    count = int.from_bytes(body[_HEAD - 8 : _HEAD], "little")
    if (size := len(body) - _HEAD) != count * MEMBER.itemsize:
        return f"it counts {count:,} members in {size:,} bytes of {MEMBER.itemsize} each"
    members = np.frombuffer(body, MEMBER, offset=_HEAD)
    for name in ("offset", "bytes", "tokens", "documents"):
        if (wrong := members[name] >= MOST).any():
            number = int(wrong.argmax())
            return f"member {number}: {name} {int(members[name][number]):,}"
    return None
