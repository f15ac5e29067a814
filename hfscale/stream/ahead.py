"""The shards of a URL that coming steps want, fetched by a thread of each rank in the order of first use, so that training need not wait.

The order says which shard comes when, arbitrarily far ahead. What is fetched is bounded by this rank's share of the cache; each round
counts it as used, so that what was trained on is removed first. What cannot be had is left to the reader, which needs it and says so.
Raw text is fetched when it is needed: which sample comes when is not known before.
"""
from __future__ import annotations

import threading
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
ROUND_S, ROUND_ROWS, PLAN_ROWS = 1.0, 2**17, 2**13  # a pause between rounds; how much further one looks, and at how much at once


def fetch_ahead(rows: TokenRows, places: Callable[[int, int], tuple[np.ndarray, Places]], *, consumed: Callable[[], int],
                global_batch: int, lanes: int) -> None:
    """Return with the thread at work, until ``rows`` are closed. ``places`` tells where the rows of (start, steps) lie on this rank."""
    every = [(manifest, entry) for manifest in rows.manifests for entry in manifest.shards]
    shards = {number: (manifest, entry) for number, (manifest, entry) in enumerate(every) if manifest.remote and manifest.dtype != TEXT}

    def fetch() -> None:
        wanted: dict[int, int] = {}  # shard -> the last position known to want it, in the order of first use
        planned, steps, warned, ended = consumed(), 1, False, False
        while not ended and shards:
            now, remote = consumed(), next(iter(shards.values()))[0].remote
            room = SHARE * remote.limit / World.from_environment().local_world_size
            wanted = {shard: last for shard, last in wanted.items() if last >= now and shard in shards}
            until, total = min(planned + ROUND_ROWS, now + int(rows.shard_rows.sum())), 0
            while planned < until and sum(shards[shard][1].bytes for shard in wanted) <= room:
                _, found = places(planned, steps)
                planned, steps = planned + steps * global_batch, max(1, PLAN_ROWS // global_batch)
                wanted |= dict.fromkeys((shard for shard in found.shard.tolist() if shard in shards), planned - 1)
            for shard in wanted:
                manifest, entry = shards[shard]
                if (total := total + entry.bytes) > max(room, entry.bytes):  # one at least
                    if planned <= now + max(lanes, global_batch) and not warned:
                        warned = True
                        logger.warning(f"data.cache.size_gb is too small for {lanes} lanes, so shards will be fetched again and again: "
                                       "give more, or fewer data.lanes in a new run")
                    break
                try:
                    with manifest.local(entry):
                        continue
                except (UserError, OSError):
                    del shards[shard]
                except CancelledError:
                    return
            ended = remote.cancelled.wait(ROUND_S)

    if shards:
        threading.Thread(target=fetch, name="stream-ahead", daemon=True).start()
