"""Checks of a node's file systems: whether it sees the folder of the run, and how fast it writes
there and reads the shards.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hfscale.checks.finding import Finding, measured
from hfscale.checks.node import Node
from hfscale.dist.world import node_name
from hfscale.errors import DataError
from hfscale.shards.files import flock
from hfscale.shards.manifest import Manifest
from hfscale.shards.open import open_manifest

# of what is read or written, whichever comes first
SECONDS = 1.0
FILE_BYTES = 2**26
PIECE = 2**23  # bytes at once
SLOW = (0.3, 0.0)  # of what the others have


def shared_files(node: Node) -> Iterator[Finding]:
    """Yield whether this node sees what was just written elsewhere."""
    task = node.task
    if task.token:
        seen = Path(task.token).is_file()
        words = f"what was just written to {task.folder} is {'' if seen else 'not '}there"
        yield Finding("shared files", "ok" if seen else "fail", words)


def locks(node: Node) -> Iterator[Finding]:
    """Yield whether the run's file system has locks, which keep two launchers out of one run
    directory.
    """
    place = node.task.folder
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            has = flock(file, wait=False)
    except OSError:  # `writing` says why
        return
    words = f"{place} has {'' if has else 'no '}locks"
    yield Finding("locks", "ok" if has else "warn", words)


def writing(node: Node) -> Iterator[Finding]:
    """Yield how fast this node writes to the folder of the run."""
    file = Path(node.task.folder) / f".hfscale-doctor-{node_name()}-{os.getpid()}"
    block = os.urandom(PIECE)
    written = 0
    begun = time.perf_counter()
    try:
        with open(file, "xb", buffering=0) as stream:
            while written < FILE_BYTES and time.perf_counter() < begun + SECONDS:
                written += stream.write(block)
                os.fsync(stream.fileno())
        took = time.perf_counter() - begun
        yield measured("writing", written / 1e6 / took, "MB/s a node", slow=SLOW)
    finally:
        file.unlink(missing_ok=True)


def reading(node: Node) -> Iterator[Finding]:
    """Yield how fast this rank reads shards of its own.

    Raises:
        DataError: if files of the shards are missing or cut short.
    """
    task, rank = node.task, node.world.all.rank
    size, took = 0, 0.0
    for manifest in (open_manifest(path, **task.remote) for path in task.shards):
        _refuse_damaged(manifest)
        shard, begun = manifest.shards[rank % len(manifest.shards)], time.perf_counter()
        if manifest.remote:
            size += manifest.remote.sample(shard)
        else:
            size += _read(manifest.folder / shard.name, seconds=SECONDS / len(task.shards))
        took += time.perf_counter() - begun
    if took:
        yield measured("reading", size / 1e6 / took, "MB/s a rank", slow=SLOW)


def _read(file: Path, *, seconds: float) -> int:
    """Return how many bytes of ``file`` came in so many ``seconds``."""
    size, until = 0, time.perf_counter() + seconds
    with open(file, "rb", buffering=0) as stream:
        # from the disk, not from memory
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while time.perf_counter() < until and (block := stream.read(PIECE)):
            size += len(block)
    return size


def _refuse_damaged(manifest: Manifest) -> None:
    if manifest.remote:
        return
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(manifest.folder)}
    wrong = [
        shard.name
        for shard in manifest.shards
        if sizes.get(shard.name) != shard.bytes or shard.index_name not in sizes
    ]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(manifest.shards)} shards are missing or have another size",
            where=manifest.folder,
            value=", ".join(wrong[:3]),
            remedy="restore them from a copy, or build the shards again",
        )
