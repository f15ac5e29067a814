"""The shards of a URL that coming steps want, fetched by a thread of each rank in the order of first use, so that training need not wait.

The order says which shard comes when, arbitrarily far ahead. What is fetched is bounded by this rank's share of the cache; each round
counts it as used, so that what was trained on is removed first. What cannot be had is left to the reader, which needs it and says so.
Raw text is fetched when it is needed: which sample comes when is not known before.
"""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError

import numpy as np

from hfscale.dist.world import World
from hfscale.errors import UserError
from hfscale.log import logger
from hfscale.shards.manifest import TEXT
from hfscale.stream.order import Places
from hfscale.stream.rows import TokenRows

SHARE = 0.8  # of the cache: the rest is for shards on their way and validation
ROUND_S, SPARSE = 1.0, 16  # between rounds; a look further ahead is further from the one before, by the 16th of its distance


def fetch_ahead(rows: TokenRows, places: Callable[[int, int], tuple[np.ndarray, Places]], *, consumed: Callable[[], int],
                global_batch: int, lanes: int) -> None:
    """Return when ``rows`` are closed, or hold no remote tokens. ``places`` tells where the rows of (start, steps) lie on this rank."""
    every = [(manifest, entry) for manifest in rows.manifests for entry in manifest.shards]
    shards = {number: (manifest, entry) for number, (manifest, entry) in enumerate(every) if manifest.remote and manifest.dtype != TEXT}
    steps, epoch, warned = -(-lanes // global_batch), int(rows.shard_rows.sum()) // global_batch, False  # steps that go through all lanes
    while shards:
        remote = next(iter(shards.values()))[0].remote
        room = SHARE * remote.limit / World.from_environment().local_world_size
        start, ahead, size, seen = consumed(), 0, 0, set[int]()
        while size <= room and ahead <= epoch:
            _, found = places(start + ahead * global_batch, steps)
            for shard in [new for new in dict.fromkeys(found.shard.tolist()) if new in shards and new not in seen]:
                manifest, entry = shards[shard]
                seen.add(shard)
                size += entry.bytes
                if size > room and len(seen) > 1:
                    break
                try:
                    with manifest.local(entry):
                        continue
                except (UserError, OSError):
                    del shards[shard]
                except CancelledError:
                    return
            if size > room and not (ahead or warned):
                warned = True
                logger.warning(f"data.cache.size_gb is too small for {lanes} lanes, so shards will be fetched again and again: "
                               "give more, or fewer data.lanes in a new run")
            ahead += max(steps, ahead // SPARSE)
        if remote.cancelled.wait(ROUND_S):
            return
