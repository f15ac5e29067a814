"""Layouts of runs drawn at random, and their rows compared with the oracle's: for the tests and a
wide sweep (benchmarks/elastic.py).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hfscale.dist.world import Place
from hfscale.stream.mixture import Mixture, Phase, plan
from hfscale.stream.order import Order
from tests.helpers import oracle

# of ranks, for a global batch of 24
CHAINS = [
    (8, 4, 6, 1),
    (1, 24),
    (2, 3, 4, 6, 8, 12, 24),
    (24, 1, 24),
    (6, 6, 6, 6),
]


@dataclass(frozen=True)
class Attempt:
    """From a start or a resume to the next stop. ``stages`` are (rows from this attempt's start,
    weights).
    """

    world_size: int
    steps: int
    stages: Sequence[tuple[int, Sequence[float]]]
    caps: Sequence[int | None]


@dataclass(frozen=True)
class Layout:
    """One run with all its stops."""

    seed: int
    shard_rows: Sequence[Sequence[int]]  # of each source
    lanes: int
    block: int
    global_batch: int
    attempts: Sequence[Attempt]


def draw(rng: random.Random, *, rows: int = 40, steps: int = 14) -> Layout:
    """Return a layout. Half have one source; epochs are often shorter than a batch, and stops fall
    anywhere in them.
    """
    sources = rng.choice([1, 1, 1, 2, 3, 4])
    shard_rows = [[rng.randint(0, rows) for _ in range(rng.randint(1, 12))] for _ in range(sources)]
    for source in shard_rows:
        source[0] += not any(source)
    global_batch = rng.choice([24, 24, 24, *range(1, 49)])
    divisors = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
    chain = (
        rng.choice(CHAINS)
        if global_batch == 24
        else [rng.choice(divisors) for _ in range(rng.randint(1, 6))]
    )

    def weights() -> list[float]:
        drawn = [rng.choice([0, 0.1, 0.3, 1, 2, 7]) for _ in range(sources)]
        return drawn if any(drawn) else [1] * sources

    attempts = []
    stages, caps = (
        [(0, weights())],
        [rng.choice([None, None, None, rng.randint(1, 300)]) for _ in range(sources)],
    )
    for world_size in chain:
        attempts.append(Attempt(world_size, rng.randint(0, steps), stages, caps))
        if sources > 1 and rng.random() < 0.5:  # a resume may change what is still to come
            stages = [
                (0, weights()),
                *((row, weights()) for row in sorted(rng.sample(range(1, 400), rng.randint(0, 2)))),
            ]
            caps = [rng.choice([None, None, rng.randint(1, 300)]) for _ in range(sources)]
        else:
            stages = [(0, stages[-1][1])]  # what is under way goes on
    least = min(map(sum, shard_rows))
    block = rng.choice([1, 2, rng.randint(3, 48), 64])
    return Layout(
        rng.getrandbits(63),
        shard_rows,
        rng.randint(1, min(32, least)),
        block,
        global_batch,
        attempts,
    )


def compare(layout: Layout) -> int:
    """Return how many rows of the run were compared; an AssertionError names the layout and the
    step that differ.
    """
    sources, consumed, past, begun = len(layout.shard_rows), 0, [Phase(0, (1,))], []
    steps: list[
        tuple[int, list[tuple[int, int, int]]]
    ] = []  # (its first position, its rows in order of position)
    for attempt in layout.attempts:
        order, end = _open(layout, attempt, past=past, consumed=consumed)
        stages = [(consumed + row, weights) for row, weights in attempt.stages]
        begun.append((consumed, stages, [math.inf if cap is None else cap for cap in attempt.caps]))
        count = (
            attempt.steps
            if end is None
            else min(attempt.steps, max(0, end - consumed) // layout.global_batch)
        )
        steps += _steps(order, layout, attempt.world_size, start=consumed, count=count)
        consumed += count * layout.global_batch
        # what a checkpoint holds beside the position
        state = json.loads(json.dumps(order.record(consumed)))
        past = [Phase(begin, tuple(counts)) for begin, counts in state.get("phases", [])] or [
            Phase(0, (1,))
        ]
    corpora = [
        oracle.Corpus(rows, seed, layout.lanes, layout.block)
        for rows, seed in zip(layout.shard_rows, _seeds(layout), strict=True)
    ]
    block = layout.block if sources > 1 else 1
    expected = list(
        oracle.run(corpora, seed=layout.seed, block=block, attempts=begun, rows=consumed)
    )[:consumed]
    assert len(expected) == consumed, layout
    for first, rows in steps:
        assert rows == expected[first : first + layout.global_batch], (
            layout,
            f"the step that begins at {first}",
        )
    assert [first for first, _ in steps] == list(range(0, consumed, layout.global_batch)), layout
    return consumed


def _seeds(layout: Layout) -> list[int]:
    return [oracle.source_seed(layout.seed, number) for number in range(len(layout.shard_rows))]


def _open(
    layout: Layout, attempt: Attempt, *, past: Sequence[Phase], consumed: int
) -> tuple[Mixture, int | None]:
    """Return the order as a new process makes it from the config and a checkpoint's state."""
    orders = [
        Order(rows, seed=seed, lanes=layout.lanes, block=layout.block)
        for rows, seed in zip(layout.shard_rows, _seeds(layout), strict=True)
    ]
    stages = [(0 if row == 0 else consumed + row, weights) for row, weights in attempt.stages]
    block = layout.block if len(orders) > 1 else 1
    phases, end = plan(stages, block=block, caps=attempt.caps, past=past, consumed=consumed)
    return Mixture(
        orders,
        fingerprints={str(s): str(s) * 64 for s in range(len(orders))},
        phases=phases,
        end=end,
    ), end


def _steps(
    order: Mixture, layout: Layout, world_size: int, *, start: int, count: int
) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """Return the rows of each step over all ranks, after checking that each rank got its share and
    each position came once.
    """
    if count == 0:
        return []
    firsts = np.cumsum([0, *(len(rows) for rows in layout.shard_rows)])
    found: dict[int, tuple[int, int, int]] = {}
    for rank in range(world_size):
        positions = order.steps(
            start, count=count, global_batch=layout.global_batch, place=Place(rank, world_size)
        )
        assert positions.shape == (count, layout.global_batch // world_size), layout
        assert (
            positions // layout.global_batch
            == start // layout.global_batch + np.arange(count)[:, None]
        ).all(), layout
        places = order.locate(positions.ravel())
        source = np.searchsorted(firsts, places.shard, side="right") - 1
        rows = zip(
            source.tolist(),
            (places.shard - firsts[source]).tolist(),
            places.row.tolist(),
            strict=True,
        )
        mine = dict(zip(positions.ravel().tolist(), rows, strict=True))
        assert len(mine) == positions.size and not mine.keys() & found.keys(), (layout, rank)
        found |= mine
    positions = range(start, start + count * layout.global_batch)
    assert sorted(found) == list(positions), layout
    return [
        (first, [found[p] for p in range(first, first + layout.global_batch)])
        for first in positions[:: layout.global_batch]
    ]
