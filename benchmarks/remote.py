"""Training-like reading from an HTTP server on the loopback, beside the same shards in a local
folder.

    python -m benchmarks.remote [--turns 5] [--steps 300]        about three minutes

A step takes 64 rows of 1024 tokens and then computes for about 20 ms (matrix products: what
fetching costs the processor shows). The cache begins empty in every turn. The server is a process
of its own; it sends as fast as it can, or at a rate that is given as a multiple of what training
reads. With "cache of 8 shards" it must remove shards all the time: the run reads more than that.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict
from hfscale.dist.world import Place
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.open import open_manifest
from hfscale.shards.writer import ShardWriter
from hfscale.stream.loader import Stream
from hfscale.stream.rows import TokenRows
from tests.helpers.orders import order_of

BATCH, SEQ, SHARDS, SHARD_TOKENS = 64, 1024, 32, 2**21
LOCAL = "local folder"
HEADER = [
    "shards from",
    "M tokens/s",
    "of the local folder",
    "waited for data",
    "s to the first batch",
]


def make_corpus(folder: Path) -> Manifest:
    """Return the manifest of random tokens in ``folder``."""
    rng, entries = np.random.default_rng(0), list[ShardEntry]()
    writer = ShardWriter(
        folder,
        name="s",
        dtype=np.dtype("<u2"),
        chunk_tokens=2**19,
        shard_chunks=4,
        committed=entries.append,
    )
    for _ in range(SHARDS):
        for document in np.split(
            rng.integers(1, 50_000, SHARD_TOKENS, dtype=np.uint16), SHARD_TOKENS // 512
        ):
            writer.add(document)
    writer.close()
    Manifest(
        dtype="uint16", tokenizer=TokenizerInfo("none", 50_000, 0), source={}, shards=tuple(entries)
    ).save(folder)
    return Manifest.load(folder)


def run(
    place: str, *, steps: int, first: list[float], waits: list[float], size_gb: float = 10.0
) -> float:
    """Return the tokens/s of a run with an empty cache, after its first batch; notes seconds to
    that, and the share of time waited.
    """
    with tempfile.TemporaryDirectory() as cache:
        began, waited = time.perf_counter(), 0.0
        options: dict[str, Any] = (
            {"folder": Path(cache), "size_gb": size_gb} if "://" in place else {}
        )
        rows = TokenRows(open_manifest(place, **options), seq_len=SEQ)
        stream = Stream(
            rows,
            order_of(rows.shard_rows, seed=1, lanes=2, block=1024),
            global_batch=BATCH,
            micro_batch=BATCH,
            place=Place(),
        )
        stream.take()
        first.append(time.perf_counter() - began)
        work, began = np.random.default_rng(0).random((700, 700), np.float32), time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            stream.take()
            waited += time.perf_counter() - asked
            for _ in range(2):
                work @ work
            stream.advance()
        seconds = time.perf_counter() - began
        stream.close()
    waits.append(waited / seconds)
    return steps * BATCH * SEQ / seconds


def serve(folder: Path, bytes_a_second: float) -> tuple[subprocess.Popen[str], str]:
    """Return a server and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.web_server", str(folder), str(int(bytes_a_second))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}"


class Case(NamedTuple):
    """How a run gets its shards."""

    bytes_a_second: float | None  # of the server: 0 is as many as it can, None is no server
    cache_gb: float


def cases_of(needed: float, shard_bytes: int) -> dict[str, Case]:
    """Return the cases, where training reads ``needed`` bytes a second; the local folder first."""
    return {
        LOCAL: Case(None, 0),
        "HTTP, as fast as it goes": Case(0, 10),
        "HTTP at 10 x what training reads": Case(10 * needed, 10),
        "the same, cache of 8 shards": Case(10 * needed, 8 * 1.02 * shard_bytes / 1e9),
        "HTTP at 0.5 x: nothing can keep ahead": Case(needed / 2, 10),
    }


@dataclass
class Taken:
    """What the turns of each case took."""

    speeds: dict[str, list[float]]  # tokens/s
    first_s: dict[str, list[float]]  # to the first batch
    waits: dict[str, list[float]]  # the share of time waited


def measure(folder: str, cases: dict[str, Case], *, steps: int, turns: int) -> Taken:
    """Return what the cases took, measured in turns; their servers run all the while."""
    servers = list[subprocess.Popen[str]]()
    first_s: dict[str, list[float]] = {case: [] for case in cases}
    waits: dict[str, list[float]] = {case: [] for case in cases}
    runs = {}
    try:
        for case, (bytes_a_second, cache_gb) in cases.items():
            place = folder
            if bytes_a_second is not None:
                server, place = serve(Path(folder), bytes_a_second)
                servers.append(server)
            runs[case] = partial(
                run,
                place,
                steps=steps,
                first=first_s[case],
                waits=waits[case],
                size_gb=cache_gb,
            )
        return Taken(interleaved(runs, repeats=turns), first_s, waits)
    finally:
        for server in servers:
            server.kill()


def report(taken: Taken) -> str:
    """Return the table, and whether the cache kept ahead where it can."""
    local = taken.speeds[LOCAL]
    reached = {case: ratio(speeds, local) for case, speeds in taken.speeds.items()}
    lines = [
        [
            case,
            spread([speed / 1e6 for speed in speeds]),
            f"{reached[case]:.3f}",
            f"{100 * median(taken.waits[case]):.1f} %",
            f"{median(taken.first_s[case]):.2f}",
        ]
        for case, speeds in taken.speeds.items()
    ]
    kept = "; ".join(
        f"{case}: {reached[case]:.3f}, {verdict(reached[case], at_least=0.97)}"
        for case in list(reached)[1:4]
    )
    return f"{table(HEADER, lines)}\n\nWhere the cache keeps ahead, of the local speed: {kept}."


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    asked = parser.parse_args()
    where = machine("numpy", "fsspec", "aiohttp")
    with tempfile.TemporaryDirectory() as folder:
        shard_bytes = make_corpus(Path(folder)).shards[0].bytes
        # bytes a second that training reads
        needed = run(folder, steps=100, first=[], waits=[]) * 2
        cases = cases_of(needed, shard_bytes)
        taken = measure(folder, cases, steps=asked.steps, turns=asked.turns)
    record(
        "remote",
        f"{where}\n`python -m benchmarks.remote`: {SHARDS} shards of "
        f"{shard_bytes / 1e6:.1f} MB over HTTP on the loopback; {asked.steps} "
        f"steps of {BATCH} x {SEQ} tokens with about 20 ms of matrix products each, "
        f"{asked.turns} turns, an empty cache in each. Training "
        f"reads {needed / 1e6:.1f} MB/s.\n\n{report(taken)}",
    )


if __name__ == "__main__":
    main()
