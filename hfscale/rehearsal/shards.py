"""The shards of a run, looked at before anything starts: all sizes, and every byte of as many as
some seconds allow, in an order of chance. A short run reads a few rows; the whole one reads all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from hfscale.config.schema import RunConfig
from hfscale.errors import DataError
from hfscale.records import open_file
from hfscale.rehearsal.plan import Looked
from hfscale.shards.manifest import Manifest, ShardEntry
from hfscale.shards.open import open_manifest
from hfscale.shards.verify import verify

BUDGET_S, THREADS = 15.0, 16


def look_at_shards(config: RunConfig, *, seed: int = 0, budget_s: float = BUDGET_S) -> Looked:
    """Return how many of the local shards were read whole; those of URLs are verified as they are
    fetched.

    Raises:
        DataError: naming a shard that is not what its manifest says.
    """
    places = [source.shards for source in config.data.sources]
    if config.data.validation:
        places.append(config.data.validation.shards)
    manifests = [open_manifest(place, **config.data.remote) for place in dict.fromkeys(places)]
    local = [manifest for manifest in manifests if not manifest.remote]
    shards = [(manifest, entry) for manifest in local for entry in manifest.shards]
    _refuse_other_sizes(shards)
    random.Random(seed).shuffle(shards)
    until, count = time.monotonic() + budget_s, 0
    for manifest, entry in shards:
        if count and time.monotonic() > until:
            break
        for finding in verify(replace(manifest, shards=(entry,)), threads=1):
            raise DataError(
                "a shard is damaged",
                where=finding,
                remedy="`hfscale shards verify` finds all that are; restore them from a copy, or "
                "build them again",
            )
        count += 1
    return Looked(shards=len(shards), read=count)


def _refuse_other_sizes(shards: Sequence[tuple[Manifest, ShardEntry]]) -> None:
    """Return if every shard has as many bytes as its manifest says.

    Raises:
        DataError: naming the first that has not, or cannot be opened.
    """

    def size(shard: tuple[Manifest, ShardEntry]) -> int:
        manifest, entry = shard
        place = manifest.folder / entry.name
        try:
            with open_file(place) as file:
                return file.seek(0, 2)
        except OSError as error:
            raise DataError(
                f"a shard cannot be opened: {error.strerror}",
                where=place,
                remedy="copy it again, mend its permissions, or build the shards again",
            ) from None

    with ThreadPoolExecutor(THREADS) as pool:
        for (manifest, entry), size_bytes in zip(shards, pool.map(size, shards), strict=True):
            if size_bytes != entry.bytes:
                raise DataError(
                    "a shard is not as long as its manifest says",
                    where=manifest.folder / entry.name,
                    value=f"{size_bytes:,} bytes, not {entry.bytes:,}",
                    remedy="copy it again, or build the shards again",
                )
