"""The shards of a URL that coming steps want, fetched by a thread of each rank in the order of
first use, so that training need not wait.

The order says which shard comes when, arbitrarily far ahead (of raw text: which sample of a lane
after which). What is fetched is bounded by this rank's share of the cache; each round counts it as
used, so that what was trained on is removed first. What cannot be had is left to the reader, which
needs it and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import numpy as np

from hfscale.dist.world import World
from hfscale.errors import UserError
from hfscale.log import logger
from hfscale.stream.prepared import RunRows

SHARE = 0.8  # of the cache: the rest is for shards on their way and validation
ROUND_S = 1.0  # between rounds


def fetch_ahead(rows: RunRows, wanted: Callable[[], Iterator[np.ndarray]]) -> None:
    """Return when ``rows`` are closed, or hold nothing remote. ``wanted`` yields the shards that
    this rank wants, look after look.
    """
    every = [(manifest, entry) for manifest in rows.manifests for entry in manifest.shards]
    shards = {
        number: (manifest, entry)
        for number, (manifest, entry) in enumerate(every)
        if manifest.remote
    }
    remote = next((manifest.remote for manifest in rows.manifests if manifest.remote), None)
    if remote is None:
        return
    room = SHARE * remote.limit / World.from_environment().local_ranks  # one limit for all
    warned = False
    while shards:
        size, seen = 0, set[int]()
        for look, found in enumerate(wanted()):
            for shard in [
                new for new in dict.fromkeys(found.tolist()) if new in shards and new not in seen
            ]:
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
            if size > room:
                if not (look or warned):
                    warned = True
                    logger.warning(
                        "data.cache.size_gb is too small for these lanes, so shards will be "
                        "fetched again and again: "
                        "give more, or fewer data.lanes in a new run"
                    )
                break
        if remote.cancelled.wait(ROUND_S):
            return
