"""The shards of a URL that coming steps want, fetched by a thread of each rank in the order of first use, so that training need not wait.

The order says which shard comes when, arbitrarily far ahead. What is fetched is bounded by this rank's share of the cache; each round
counts it as used, so that what was trained on is removed first. What cannot be had is left to the reader, which needs it and says so.
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from itertools import accumulate

import numpy as np

from hfscale.dist.world import World
from hfscale.errors import UserError
from hfscale.log import logger
from hfscale.stream.order import Places
from hfscale.stream.rows import TokenRows

SHARE = 0.8  # of the cache: the rest is for shards on their way and validation
ROUND_S, ROUND_ROWS = 1.0, 2**17  # a pause between rounds; how much further a round looks, in rows of all ranks
PLAN_ROWS = 2**13  # looked at at once


class Ahead:
    """The thread, where ``rows`` has remote shards. ``places(start, steps)`` gives this rank's positions and their places."""

    def __init__(self, rows: TokenRows, places: Callable[[int, int], tuple[np.ndarray, Places]], *, consumed: Callable[[], int],
                 global_batch: int, lanes: int) -> None:
        every = [(manifest, entry) for manifest in rows.manifests for entry in manifest.shards]
        self._shards = {number: (manifest, entry) for number, (manifest, entry) in enumerate(every) if manifest.remote}
        self._remotes = [manifest.remote for manifest in rows.manifests if manifest.remote]
        self._places, self._consumed, self._global_batch, self._lanes = places, consumed, global_batch, lanes
        self._epoch_rows = int(rows.shard_rows.sum())
        self._last: dict[int, int] = {}  # shard -> the last position known to want it; in the order of first use
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream-ahead", daemon=True)
        if self._remotes:
            self._room = SHARE * min(remote.limit for remote in self._remotes) / World.from_environment().local_world_size
            self._thread.start()

    def close(self) -> None:
        """Return with the thread ended; whatever else fetches for these rows gives up too."""
        self._closed.set()
        for remote in self._remotes:
            remote.cancelled.set()
        if self._remotes:
            self._thread.join()

    def _run(self) -> None:
        planned, steps, failed, said = self._consumed(), 1, set[int](), False
        while not self._closed.is_set():
            consumed = self._consumed()
            self._last = {shard: last for shard, last in self._last.items() if last >= consumed}
            until = min(planned + ROUND_ROWS, consumed + self._epoch_rows)
            while self._fitting() == len(self._last) and planned < until:
                _, places = self._places(planned, steps)
                planned, steps = planned + steps * self._global_batch, max(1, PLAN_ROWS // self._global_batch)
                self._last |= dict.fromkeys((shard for shard in places.shard.tolist() if shard in self._shards), planned - 1)
            fitting = self._fitting()
            if fitting < len(self._last) and planned <= consumed + max(self._lanes, self._global_batch) and not said:
                said = True
                logger.warning(f"data.cache.size_gb is too small for the {self._lanes} lanes of the data: shards will be fetched again and "
                               f"again. This rank's share of it is {self._room / 1e9:.3g} GB; give more, or fewer data.lanes in a new run")
            for shard in [shard for shard in self._last if shard not in failed][:max(1, fitting)]:
                manifest, entry = self._shards[shard]
                try:
                    with manifest.local(entry):
                        continue
                except CancelledError:
                    return
                except (UserError, OSError):
                    failed.add(shard)
            self._closed.wait(ROUND_S)

    def _fitting(self) -> int:
        """Return how many of the shards, from the first on, this rank's share of the cache holds."""
        return sum(total <= self._room for total in accumulate(self._shards[shard][1].bytes for shard in self._last))
