"""A row of a run's data that no model has learnt to expect, put where a given step reads it.

The tokens are written into the shard itself, of which the manifest and so the order of the run know
nothing: the run before and the one after have the same rows but for this one. Such a run reads with
``data.verify: false``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfscale.config.schema import RunConfig
from hfscale.run.sources import Sources
from hfscale.shards.reader import ShardReader


def plant(config: RunConfig, position: int, ids: Sequence[int]) -> None:
    """Write ``ids`` over the row at ``position`` of the run, from its second token on; the first
    is of another row too.
    """
    tokens, order = Sources(config).plan(None)
    places = order.locate(np.array([position]))
    shard, row = int(places.shard[0]), int(places.row[0])
    manifest, entry = tokens.shard(shard)
    reader = ShardReader(manifest.folder, entry, dtype=manifest.numpy_dtype, verify=False)
    first = row * tokens.seq_len + 1
    spots = np.arange(first, first + tokens.seq_len - 1)
    where = reader.indices(spots, reader.chunks_of(spots))
    memory = np.memmap(manifest.folder / entry.name, manifest.numpy_dtype, "r+")
    memory[where] = np.resize(np.array(ids), len(spots))
    memory.flush()
