"""Our reader of rows, as benchmarks/stream.py measures it: the corpus, the readers, and what ours
costs taken to pieces.

The corpus is one for all: `folder/shards`, and the same tokens as `folder/flat.bin` for the peers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from benchmarks.common import interleaved
from benchmarks.peers.streams import BATCH, SEQ, Batches, Reader, tokens_of
from hfscale.dist.world import Place
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.writer import ShardWriter
from hfscale.stream.loader import SLAB_TOKENS, Stream
from hfscale.stream.rows import TokenRows
from hfscale.stream.state import StreamState
from tests.helpers.orders import order_of

IN_ORDER = "ours, in order, with documents' boundaries"
SHUFFLED = "ours, shuffled, with documents' boundaries"


def make_corpus(folder: Path, tokens: int) -> None:
    """Return with ``folder/shards`` and ``folder/flat.bin`` holding the same random tokens, and
    ``ends.npy`` their documents.
    """
    if not (folder / "shards" / "manifest.json").exists():
        rng, entries = np.random.default_rng(0), list[ShardEntry]()
        stream = rng.integers(1, 50_000, tokens, dtype=np.uint16)
        ends = np.cumsum(1 + rng.exponential(600, tokens // 300).astype(int))
        writer = ShardWriter(
            folder / "shards",
            name="bench",
            dtype=np.dtype("<u2"),
            chunk_tokens=2**20,
            shard_chunks=32,
            committed=entries.append,
        )
        for document in np.split(stream, ends[ends < tokens]):
            writer.add(document)
        writer.close()
        Manifest(
            dtype="uint16",
            tokenizer=TokenizerInfo("none", 50_000, 0),
            source={},
            shards=tuple(entries),
        ).save(folder / "shards")
        stream.tofile(folder / "flat.bin")
        np.save(folder / "ends.npy", ends[ends < tokens])
    for path in (folder / "flat.bin", *(folder / "shards").glob("*.tar")):
        drop(path)  # what was written may lie in larger pages
        path.read_bytes()


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -------------------------------------------------------------------------------------- the readers
def open_stream(
    folder: Path,
    *,
    lanes: Literal["auto"] | int,
    block: int,
    with_documents: bool = False,
    state: dict[str, Any] | None = None,
) -> Stream:
    """Return the whole path: manifest, order, reader thread."""
    rows = TokenRows(folder / "shards", seq_len=SEQ)
    order = order_of(rows.shard_rows, seed=1, lanes=lanes, block=block)
    return Stream(
        rows,
        order,
        global_batch=BATCH,
        micro_batch=BATCH,
        place=Place(),
        with_documents=with_documents,
        state=StreamState.from_dict(state) if state else None,
    )


def ours(folder: Path, state: Any, epochs: int, **options: Any) -> Batches:
    """Yield its batches for ever."""
    stream = open_stream(folder, state=state or None, **options)
    try:
        while True:
            [batch] = stream.take()
            assert (batch.boundaries is not None) == options.get("with_documents", False)
            yield batch.ids_BL  # type: ignore[misc]
            stream.advance()
    finally:
        stream.close()


def our_state(folder: Path, batch: int, **options: Any) -> Any:
    """Return what a checkpoint holds after so many batches."""
    stream = open_stream(folder, **options)
    state = {**stream.state().to_dict(), "consumed_rows": batch * BATCH}
    stream.close()
    return state


def our_reader(**options: Any) -> Reader:
    """Return our stream with these options."""
    return Reader(partial(ours, **options), partial(our_state, **options))


OURS = {
    IN_ORDER: our_reader(lanes=1, block=1, with_documents=True),
    "ours, in order": our_reader(lanes=1, block=1),
    SHUFFLED: our_reader(lanes="auto", block=1024, with_documents=True),
    "ours, shuffled": our_reader(lanes="auto", block=1024),
}


# ---------------------------------------------------------------------------- ours, taken to pieces
def pieces(folder: Path, turns: int) -> dict[str, list[float]]:
    """Return the seconds that an epoch in order takes to write as int64 alone, to copy prepared
    rows, and to prepare them.
    """
    rows = TokenRows(folder / "shards", seq_len=SEQ)
    order = order_of(rows.shard_rows, seed=1, lanes=1, block=1)
    step = SLAB_TOKENS // SEQ
    slab, flat = np.empty((step, SEQ + 1), np.int64), np.asarray(tokens_of(folder))
    windows = np.lib.stride_tricks.as_strided(flat, (order.rows, SEQ + 1), (2 * SEQ, 2))
    plans: list[Any] = []

    def write() -> None:
        for first in range(0, len(windows) - step + 1, step):
            slab[:] = windows[first : first + step]

    def prepare() -> None:
        plans.clear()
        for first in range(0, order.rows, 2**15):
            places = order.locate(np.arange(first, min(order.rows, first + 2**15)))
            n = len(places.row) // BATCH * BATCH
            plans.append(rows.prepare(places.shard[:n], places.row[:n], documents_per=BATCH))

    def copy() -> None:
        for plan in plans:
            for first, last in pairwise([*range(0, len(plan.valid), step), len(plan.valid)]):
                plan.fill(slice(first, last), slab[: last - first])

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return interleaved(
        {work.__name__: partial(seconds, work) for work in (write, prepare, copy)},
        repeats=turns,
        warm=1,
    )


def cold_waits(folder: Path, *, step_s: float, ahead: bool) -> tuple[float, float, float]:
    """Return the seconds to the first batch, all that training waits for data after it, and the
    longest wait; nothing is in the page cache.

    Without ``ahead`` there is no reader thread: rows are prepared where they are asked for.
    """
    for path in (folder / "shards").glob("*.tar"):
        drop(path)
    stream, waits = open_stream(folder, lanes=8, block=1024), []
    if not ahead:
        stream.close()
        stream._closed = False
        stream._reader = SimpleNamespace(
            submit=lambda work, *what: SimpleNamespace(result=partial(work, *what)),
            shutdown=stream.close,
        )
        stream._next = stream._reader.submit(stream._prepare, 0, 1)
        for path in (folder / "shards").glob("*.tar"):
            drop(path)
    for _ in range(1000):
        asked = time.perf_counter()
        stream.take()
        waits.append(time.perf_counter() - asked)
        time.sleep(step_s)
        stream.advance()
    if ahead:
        stream.close()
    return waits[0], sum(waits[1:]), max(waits[1:])


def order_alone(turns: int) -> str:
    """Return what the order costs where the data is a trillion tokens in 100,000 shards: to start,
    and a row.
    """
    starts, each = [], []
    shard_rows = np.full(100_000, 9766)
    for _ in range(turns):
        began = time.perf_counter()
        order = order_of(shard_rows, seed=1, lanes="auto", block=1024)
        order.locate(order.steps(order.rows // 2, count=1, global_batch=4096, place=Place())[0])
        starts.append(time.perf_counter() - began)
        began = time.perf_counter()
        order.locate(
            order.steps(order.rows // 3, count=32, global_batch=BATCH, place=Place()).ravel()
        )
        each.append((time.perf_counter() - began) / 1024)
    return (
        f"The order of 1e12 tokens in 100,000 shards: {median(starts) * 1e3:.0f} ms to "
        f"start at 50 %, {median(each) * 1e6:.2f} us a row."
    )
