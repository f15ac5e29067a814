"""The batch digest: one number that names what a global step trained on, however it was cut into ranks and micro-batches."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from torch import Tensor


def batch_digest(ids: Iterable[Tensor]) -> int:
    """Return the sum modulo 2**64 of the BLAKE2b-64 of each row of the (B, T) id tensors, as a signed int64.

    A row is hashed as little-endian int64, a digest is read as a little-endian number. A sum of the ranks' digests in int64
    (all-reduce; it wraps) is the digest of the global batch; ``% 2**64`` gives the unsigned number of the metrics.
    """
    total = 0
    for ids_BT in ids:
        for row in np.ascontiguousarray(ids_BT.detach().cpu().numpy(), dtype="<i8"):
            total += int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little")
    return (total + 2**63) % 2**64 - 2**63
