"""Exactly once on any chain of sizes, by brute force; and what the order of a trillion tokens costs
one of 4,096 ranks to start.

    python -m benchmarks.elastic [--layouts 5000] [--procs 4]

Part 1 draws layouts (seed, shards, lanes, block, global batch, mixture with stages and caps, chain
of world sizes with stops anywhere, other weights on a resume) and compares every row of every step,
over all ranks, with a naive oracle of one process (tests/helpers/oracle.py). Part 2 deals steps of
a trillion tokens to 4,096 ranks. Part 3 opens manifest and order of one rank in fresh processes
without torch. A minute and a half on four cores.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.common import machine, record, table, verdict
from hfscale.dist.world import Place
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from tests.helpers.elastic import compare, draw
from tests.helpers.orders import order_of

SEQ, RANKS, SHARDS = 1024, 4096, 100_000
START = """
import sys, time
from pathlib import Path
import numpy
from hfscale.stream.rows import TokenRows
from tests.helpers.orders import order_of
assert "torch" not in sys.modules
def peak_mib():  # of this process; getrusage's may be its parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
before, began = peak_mib(), time.perf_counter()
rows = TokenRows(sys.argv[1], seq_len=int(sys.argv[2]))
opened = time.perf_counter()
order = order_of(rows.shard_rows, seed=1, lanes="auto", block=1024)
[step] = order.steps(order.rows // 2, count=1, global_batch=8192, place=Place(4095, 4096))
order.locate(step)
ended = time.perf_counter()
print(ended - began, ended - opened, peak_mib() - before, peak_mib())
"""


def part(seeds: range) -> tuple[int, int, int]:
    """Return the rows compared, the stops made and the layouts that ended in another epoch than
    they began in.
    """
    rows = stops = straddling = 0
    for seed in seeds:
        layout = draw(random.Random(seed))
        compared = compare(layout)
        rows, stops = rows + compared, stops + len(layout.attempts) - 1
        straddling += compared > sum(map(sum, layout.shard_rows))
    return rows, stops, straddling


def sweep(layouts: int, procs: int) -> str:
    """Return what the brute force compared; a difference is an AssertionError that names the
    layout.
    """
    began = time.perf_counter()
    with ProcessPoolExecutor(procs) as pool:
        found = list(
            pool.map(
                part, (range(first, min(first + 50, layouts)) for first in range(0, layouts, 50))
            )
        )
    rows, stops, straddling = (sum(column) for column in zip(*found, strict=True))
    return (
        f"{layouts:,} layouts, {straddling:,} of them longer than an epoch, with {stops:,} "
        f"stops: {rows:,} rows compared with the "
        f"oracle, 0 differ. {time.perf_counter() - began:.0f} s in {procs} processes."
    )


def trillion() -> str:
    """Return what was found in a trillion tokens: steps of 4,096 ranks, whole blocks, and a million
    places that all differ.
    """
    began = time.perf_counter()
    order = order_of(
        np.full(SHARDS, 9766) - np.arange(SHARDS) % 2, seed=1, lanes="auto", block=1024
    )
    for start in (
        0,
        order.rows // 2 // 8192 * 8192,
        order.rows - 4096,
        7 * order.rows - 1,
    ):  # the last two straddle an epoch's end
        alone = order.steps(start, count=1, global_batch=8192, place=Place())[0]
        dealt = [
            order.steps(start, count=1, global_batch=8192, place=Place(rank, RANKS))[0]
            for rank in range(RANKS)
        ]
        np.testing.assert_array_equal(np.concatenate(dealt), alone)
        np.testing.assert_array_equal(np.sort(alone), start + np.arange(8192))
    rng = np.random.default_rng(0)
    positions = np.unique(rng.integers(0, order.rows, 10**6)) + 3 * order.rows
    places = order.locate(positions)
    assert len(np.unique(places.shard << 32 | places.row)) == len(positions)
    assert (places.row < order.orders[0].shard_rows[places.shard]).all()
    for lane, block in zip(
        rng.integers(0, order.lanes, 20).tolist(),
        rng.integers(0, order.rows // order.lanes // 1024, 20).tolist(),
    ):
        places = order.locate((block * 1024 + np.arange(1024)) * order.lanes + lane)
        assert len(set(zip(places.shard.tolist(), places.row.tolist(), strict=True))) == 1024
    return (
        f"{order.rows * SEQ:.3g} tokens, {order.rows:,} rows in {SHARDS:,} shards: steps of "
        f"8,192 rows dealt to {RANKS:,} ranks "
        f"are the step of one rank, also over an epoch's end; {len(positions):,} positions "
        "have as many places. "
        f"{time.perf_counter() - began:.0f} s."
    )


def start_s(folder: Path, *, shards: int, tokens: float, turns: int = 5) -> tuple[float, ...]:
    """Return medians for one of 4,096 ranks in a fresh process: seconds to its first rows, of the
    order alone, MiB more, MiB in all.
    """
    each = round(tokens / shards)
    entries = tuple(
        ShardEntry(f"shard-{k:06d}.tar", 2 * each, each, each // 600, f"{k:064x}", 50_000)
        for k in range(shards)
    )
    Manifest(
        dtype="uint16", tokenizer=TokenizerInfo("0" * 64, 50_001, 0), source={}, shards=entries
    ).save(folder)
    taken = []
    for _ in range(turns):
        done = subprocess.run(
            [sys.executable, "-c", START, str(folder), str(SEQ)],
            capture_output=True,
            text=True,
            check=True,
        )
        taken.append([float(word) for word in done.stdout.split()])
    return tuple(median(column) for column in zip(*taken, strict=True))


def main() -> None:
    """Measure, print, and write the section ``elastic`` of RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", type=int, default=5000)
    parser.add_argument("--procs", type=int, default=4)
    asked = parser.parse_args()
    where, lines = machine("numpy"), []
    for shards, tokens in (
        (1000, 1e9),
        (1000, 1e12),
        (SHARDS, 1e9),
        (SHARDS, 1e10),
        (SHARDS, 1e12),
        (SHARDS, 1e14),
    ):
        with tempfile.TemporaryDirectory() as folder:
            whole, order, more, peak = start_s(Path(folder), shards=shards, tokens=tokens)
        lines.append(
            [
                f"{shards:,}",
                f"{tokens:.0e}",
                f"{whole:.3f}",
                f"{order * 1e3:.1f}",
                f"{more:.0f}",
                f"{peak:.0f}",
            ]
        )
        if (shards, tokens) == (SHARDS, 1e12):
            met = (
                f"At 1e12 tokens: {verdict(whole, at_most=1)} s, {verdict(peak, at_most=200)} MiB."
            )
    header = [
        "shards",
        "tokens",
        "s to the first rows",
        "of which the order, ms",
        "MiB more than the imports",
        "MiB in all",
    ]
    record(
        "elastic",
        "\n\n".join(
            [
                where,
                sweep(asked.layouts, asked.procs),
                trillion(),
                f"Start of one of {RANKS:,} ranks at 50 % of the data, in a fresh process "
                "without torch, medians of 5: manifest, rows, order, its "
                "share of a step of 8,192 rows.",
                table(header, lines),
                met,
            ]
        ),
    )


if __name__ == "__main__":
    main()
