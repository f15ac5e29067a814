"""The order of a run over one source, for tests and benchmarks that have no config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from hfscale.stream.mixture import Mixture
from hfscale.stream.order import Order


def order_of(
    shard_rows: Sequence[int] | np.ndarray, *, seed: int, lanes: Literal["auto"] | int, block: int
) -> Mixture:
    """Return what a run reads whose one source has shards of these many rows."""
    return Mixture(
        [Order(shard_rows, seed=seed, lanes=lanes, block=block)], fingerprints={"text": "0" * 64}
    )
