"""The batch digest: one number that names what a global step trained on, however it was cut into ranks and micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from torch import Tensor


def batch_digest(ids: Iterable[Tensor]) -> int:
    """Return the sum modulo 2**64 of the BLAKE2b-64 of each row of the (B, T) id tensors, as a signed int64.

    A sum of the ranks' digests in int64 (all-reduce; it wraps) is the digest of the global batch.
    """
    return (
        sum(digest_rows(ids_BT.detach().cpu().numpy()) for ids_BT in ids) + 2**63
    ) % 2**64 - 2**63


def digest_rows(ids_BT: np.ndarray) -> int:
    """Return the sum, modulo 2**64, of the rows' digests: the unsigned number of the metrics.

    A row is hashed as little-endian int64, a digest is read as a little-endian number.
    """
    rows = np.ascontiguousarray(ids_BT, dtype="<i8")
    return (
        sum(int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little") for row in rows)
        % 2**64
    )
