"""How fast rows become batches, against a flat np.memmap; how long a resume takes, against its position.

    python -m benchmarks.stream [--tokens 1e8] [--turns 7] [--folder FOLDER]

The corpus is synthetic: random uint16 ids in documents of 600 tokens on average, once as shards of 64 MB with chunks of 2 MB and
once as the same tokens in one flat file. A turn reads one epoch as batches of 32 x 1024 int64 in this process, page cache warm.
Files are opened again in every turn; "first pass" includes opening, checksums and page faults, "later" is the next epoch of
the same reader. The flat file is read into a preallocated batch, in order, which is the fastest that numpy does.
"""
from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.writer import ShardWriter
from hfscale.stream.loader import Stream
from hfscale.stream.order import Order
from hfscale.stream.rows import TokenRows

BATCH, SEQ = 32, 1024
IN_ORDER, SHUFFLED = "shards, in order: TokenRows", "shards, shuffled by order.py: Stream"
PLACES = (0.0, 0.01, 0.5, 0.99, 1000.5)  # of a resume, in epochs


def make_corpus(folder: Path, tokens: int) -> None:
    """Return with ``folder/shards`` and ``folder/flat.bin`` holding the same random tokens, unless they are there."""
    if (folder / "shards" / "manifest.json").exists():
        return
    rng, entries = np.random.default_rng(0), list[ShardEntry]()
    stream = rng.integers(1, 50_000, tokens, dtype=np.uint16)
    ends = np.cumsum(1 + rng.exponential(600, tokens // 300).astype(int))
    writer = ShardWriter(folder / "shards", name="bench", dtype=np.dtype("<u2"), chunk_tokens=2**20, shard_chunks=32,
                         committed=entries.append)
    for document in np.split(stream, ends[ends < tokens]):
        writer.add(document)
    writer.close()
    Manifest(dtype="uint16", tokenizer=TokenizerInfo("none", 50_000, 0), source={}, shards=tuple(entries)).save(folder / "shards")
    stream.tofile(folder / "flat.bin")


def timed(passes: Iterator[int]) -> list[float]:
    """Return the speed of each pass in M tokens/s; a pass yields how many tokens it read."""
    speeds, began = [], time.perf_counter()
    for tokens in passes:
        ended = time.perf_counter()
        speeds.append(tokens / (ended - began) / 1e6)
        began = time.perf_counter()
    return speeds


def flat(folder: Path) -> Iterator[int]:
    """Yield after each of two passes over the flat file, in order."""
    tokens, batch = np.memmap(folder / "flat.bin", np.uint16, "r"), np.empty((BATCH, SEQ), np.int64)
    for _ in range(2):
        for first in range(0, len(tokens) - batch.size + 1, batch.size):
            batch[:] = tokens[first:first + batch.size].reshape(BATCH, SEQ)
        yield len(tokens) // batch.size * batch.size


def in_order(folder: Path) -> Iterator[int]:
    """Yield after each of two passes over the shards in order, without order.py and thread: the reading alone."""
    rows, slab = TokenRows(folder / "shards", seq_len=SEQ), np.empty((1024, SEQ + 1), np.int64)
    for _ in range(2):
        read = 0
        for shard, count in enumerate(rows.shard_rows.tolist()):
            for first in range(0, count, len(slab)):
                numbers = np.arange(first, min(first + len(slab), count))
                rows.fill(np.full(len(numbers), shard), numbers, slab)
                for start in range(0, len(numbers), BATCH):
                    batch = slab[start:start + BATCH]
                    read += len(batch) * SEQ
        yield read


def stream(folder: Path, *, lanes: Literal["auto"] | int, block: int, with_documents: bool = False) -> Iterator[int]:
    """Yield after each of two epochs of the whole path: order, reader thread, take and advance."""
    rows = TokenRows(folder / "shards", seq_len=SEQ)
    order = Order(rows.shard_rows, seed=1, lanes=lanes, block=block)
    reader = Stream(rows, order, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, with_documents=with_documents)
    for _ in range(2):
        for _ in range(order.rows // BATCH):
            [batch] = reader.take()
            assert len(batch.ids_BL) == BATCH
            reader.advance()
        yield order.rows // BATCH * BATCH * SEQ
    reader.close()


def resume_s(folder: Path, epochs: float) -> float:
    """Return the seconds from nothing but a state to the first batch: manifest, order, reader, checksums of what it touches."""
    rows = TokenRows(folder / "shards", seq_len=SEQ)
    order = Order(rows.shard_rows, seed=1, lanes="auto", block=1024)
    first = Stream(rows, order, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1)
    state = first.state()
    first.close()
    began = time.perf_counter()
    rows = TokenRows(folder / "shards", seq_len=SEQ)
    order = Order(rows.shard_rows, seed=1, lanes="auto", block=1024)
    saved = type(state).from_dict({**state.to_dict(), "consumed_rows": int(epochs * order.rows) // BATCH * BATCH})
    reader = Stream(rows, order, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, state=saved)
    reader.take()
    seconds = time.perf_counter() - began
    reader.close()
    return seconds


def order_alone(turns: int) -> str:
    """Return what the order costs where the data is a trillion tokens in 100,000 shards: to start, and a row."""
    starts, each = [], []
    shard_rows = np.full(100_000, 9766)
    for _ in range(turns):
        began = time.perf_counter()
        order = Order(shard_rows, seed=1, lanes="auto", block=1024)
        order.locate(order.steps(order.rows // 2, count=1, global_batch=4096, rank=0, world_size=1)[0])
        starts.append(time.perf_counter() - began)
        began = time.perf_counter()
        order.locate(order.steps(order.rows // 3, count=32, global_batch=BATCH, rank=0, world_size=1).ravel())
        each.append((time.perf_counter() - began) / 1024)
    return f"The order of 1e12 tokens in 100,000 shards: {median(starts) * 1e3:.0f} ms to start at 50 %, {median(each) * 1e6:.2f} us a row."


def main() -> None:
    """Measure, print, and write the section ``stream`` of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e8)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keeps the corpus for another run")
    arguments = parser.parse_args()
    where = machine("numpy", "torch")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        make_corpus(folder, int(arguments.tokens))
        later: dict[str, list[float]] = {}

        def first_pass(name: str, passes: Callable[[], Iterator[int]]) -> Callable[[], float]:
            def measure() -> float:
                first, second = timed(passes())
                later.setdefault(name, []).append(second)
                return first
            return measure

        readers: dict[str, Callable[[], Iterator[int]]] = {
            "flat np.memmap, in order": lambda: flat(folder),
            IN_ORDER: lambda: in_order(folder),
            "shards, in order, with thread and state: Stream": lambda: stream(folder, lanes=1, block=1),
            SHUFFLED: lambda: stream(folder, lanes="auto", block=1024),
            "the same with document ids": lambda: stream(folder, lanes="auto", block=1024, with_documents=True),
        }
        first = interleaved({name: first_pass(name, passes) for name, passes in readers.items()}, repeats=arguments.turns, warm=1)
        later = {name: speeds[1:] for name, speeds in later.items()}
        resumes = interleaved({f"{place:g}": partial(resume_s, folder, place) for place in PLACES}, repeats=arguments.turns, warm=1)

    base, targets = next(iter(readers)), {IN_ORDER: 0.6, SHUFFLED: 0.3}
    lines = []
    for name in readers:
        reached = ratio(later[name], later[base])
        lines.append([name, spread(first[name], form="{:.0f}"), f"{ratio(first[name], first[base]):.2f}",
                      spread(later[name], form="{:.0f}"), f"{reached:.2f}",
                      verdict(reached, at_least=targets[name]) if name in targets else ""])
    half, peak_gib = median(resumes["0.5"]) * 1e3, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    record("stream", "\n\n".join([
        f"{where} {arguments.tokens:.3g} tokens, batches of {BATCH} x {SEQ} int64, one process. M tokens/s, median (quartiles) of "
        f"{arguments.turns} turns; ratios to the flat file of the same turn. First pass: with opening, checksums, page faults.",
        table(["reader", "first pass", "ratio", "later", "ratio", "target (later)"], lines),
        "Resume, from a state to the first batch, checksums included: "
        + ", ".join(f"{median(seconds) * 1e3:.1f} ms at {place} epochs" for place, seconds in resumes.items())
        + f". At 50 %: {verdict(half, at_most=20)} ms.",
        order_alone(arguments.turns) + f" Peak memory of this process: {peak_gib:.2f} GiB, mapped pages of the corpus included.",
    ]))


if __name__ == "__main__":
    main()
