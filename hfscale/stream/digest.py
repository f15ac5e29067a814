"""The batch digest: one number that names what a global step trained on, however it was cut into
ranks and micro-batches.

It is the sum modulo 2**64 of the BLAKE2b-64 of each row, read as little-endian numbers. What a row
is:

- of shards and raw text, its ``seq_len + 1`` ids as little-endian int64: inputs and last label,
  before any corruption, from the tensor that inputs and labels are cut out of;
- of labelled examples, its feature as the task made it (ids, labels, all views) as JSON with sorted
  keys, without the padding.

Masks, spans and crops are drawn from (seed, position of the row), so rows and positions name them
too. Version 1, of metrics without a ``digest_version``, left the last label out, and of examples
all but ``input_ids``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # so that checks on the login node need no torch
    from torch import Tensor

    from hfscale.stream.examples import Examples
    from hfscale.stream.rows import Rows

VERSION = 2


def step_digest(micro_batches: Iterable[Rows | Examples]) -> int:
    """Return the digest of micro-batches as they leave the stream, as a signed int64."""
    total = sum(
        digest_features(micro.features)
        if hasattr(micro, "features")
        else digest_rows(micro.ids_BL.numpy())
        for micro in micro_batches
    )
    return _signed(total)


def batch_digest(ids: Iterable[Tensor]) -> int:
    """Return the digest of the rows of (B, L + 1) id tensors, as a signed int64.

    A sum of the ranks' digests in int64 (all-reduce; it wraps) is the digest of the global batch.
    """
    return _signed(sum(digest_rows(ids_BL.detach().cpu().numpy()) for ids_BL in ids))


def digest_rows(ids_BL: np.ndarray) -> int:
    """Return the sum, modulo 2**64, of the rows' digests: the unsigned number of the metrics."""
    return _sum(row.data for row in np.ascontiguousarray(ids_BL, dtype="<i8"))


def digest_features(features: Iterable[Mapping[str, object]]) -> int:
    """Return the same of features; ``example``, a number in the split, is no part of what is
    learnt.
    """
    return _sum(
        json.dumps(
            {name: value for name, value in feature.items() if name != "example"}, sort_keys=True
        ).encode()
        for feature in features
    )


def _sum(rows: Iterable[bytes | memoryview]) -> int:
    digests = (hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return sum(int.from_bytes(digest, "little") for digest in digests) % 2**64


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63
