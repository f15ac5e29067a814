"""The order is brute-forced: every layout small enough to list is listed, and the large ones are
sampled.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfscale.dist.world import Place
from hfscale.errors import ConfigError, DataError
from hfscale.stream.mixture import Mixture
from hfscale.stream.order import Order, key_of, mix, permute, resolve_lanes
from tests.helpers.orders import order_of

layouts = st.tuples(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),  # rows of each shard
    st.integers(1, 32),  # lanes
    st.integers(1, 48),  # block
    st.integers(0, 2**63 - 1),  # seed
)


def make(layout) -> Mixture:
    shard_rows, lanes, block, seed = layout
    return order_of(shard_rows, seed=seed, lanes=min(lanes, sum(shard_rows)), block=block)


def global_step(order: Mixture, start: int, global_batch: int, world_size: int) -> np.ndarray:
    slices = [
        order.steps(start, count=1, global_batch=global_batch, place=Place(r, world_size))[0]
        for r in range(world_size)
    ]
    return np.concatenate(slices)


@settings(max_examples=400, deadline=None)
@given(layouts, st.integers(0, 2**40))
def test_every_epoch_holds_every_row_exactly_once(layout, epoch):
    order = make(layout)
    places = order.locate(np.arange(order.rows) + epoch * order.rows)
    seen = sorted(zip(places.shard.tolist(), places.row.tolist()))
    assert seen == [(s, r) for s, rows in enumerate(layout[0]) for r in range(rows)]
    assert set(places.epoch.tolist()) == {epoch}


@settings(max_examples=200, deadline=None)
@given(layouts, st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=8))
def test_any_chain_of_sizes_yields_the_oracle(layout, chain):
    """World size and global batch change at every stop; the chain straddles epoch ends, and often a
    batch is longer than an epoch.
    """
    order, position, read = make(layout), 0, []
    for world_size, share in chain:
        step = global_step(order, position, world_size * share, world_size)
        # each position once, on one rank
        assert sorted(step.tolist()) == list(range(position, position + world_size * share))
        # the same batch in the same order
        np.testing.assert_array_equal(step, global_step(order, position, world_size * share, 1))
        read.append(np.sort(step))
        position += world_size * share
    np.testing.assert_array_equal(np.concatenate(read), np.arange(position))


@given(layouts, st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_many_steps_at_once_are_the_steps_one_by_one(layout, start, count, world_size):
    order = make(layout)
    many = order.steps(
        start, count=count, global_batch=4 * world_size, place=Place(world_size - 1, world_size)
    )
    for k in range(count):
        one = order.steps(
            start + k * 4 * world_size,
            count=1,
            global_batch=4 * world_size,
            place=Place(world_size - 1, world_size),
        )
        np.testing.assert_array_equal(many[k], one[0])


def test_locate_depends_on_the_position_alone():
    order = Order([50, 7, 90], seed=5, lanes=6, block=8)
    positions = np.random.default_rng(0).integers(0, 5 * order.rows, 2000)
    together, fresh = order.locate(positions), Order([50, 7, 90], seed=5, lanes=6, block=8)
    for p in (0, 17, 1999):
        alone = fresh.locate(positions[p : p + 1])
        assert [alone.shard[0], alone.row[0], alone.lane[0]] == [
            together.shard[p],
            together.row[p],
            together.lane[p],
        ]


def test_the_order_never_changes_between_versions():
    """A run made by an older version resumes on its own order: these numbers are a promise."""
    places = Order([5, 2, 6], seed=17, lanes=4, block=2).locate(np.arange(24, 32))
    assert (
        list(
            zip(
                places.epoch.tolist(),
                places.lane.tolist(),
                places.shard.tolist(),
                places.row.tolist(),
            )
        )
        == GOLDEN
    )
    big = Order(np.arange(1000) % 97, seed=1, lanes=64, block=1024).locate(
        np.arange(10**9, 10**9 + 5000)
    )
    assert (
        int((mix(big.shard.astype(np.uint64) << np.uint64(32) | big.row.astype(np.uint64))).sum())
        == GOLDEN_SUM
    )


GOLDEN = [
    (1, 3, 1, 1),
    (1, 0, 2, 2),
    (2, 0, 2, 1),
    (2, 1, 2, 4),
    (2, 2, 0, 1),
    (2, 3, 0, 4),
    (2, 0, 2, 0),
    (2, 1, 2, 5),
]
GOLDEN_SUM = 15903114539794337467


def test_epochs_and_seeds_differ():
    def rows(seed, epoch):
        places = order_of(seed).locate(np.arange(1000) + epoch * 1000)
        return places.shard * 1000 + places.row

    def order_of(seed):
        return Order([100] * 10, seed=seed, lanes=10, block=100)

    lists = [rows(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for k, a in enumerate(lists):
        for b in lists[:k]:
            assert (a == b).mean() < 0.02


def test_a_step_reads_from_as_many_lanes_as_it_can():
    order = order_of([1000] * 100, seed=3, lanes=64, block=256)
    places = order.locate(order.steps(12345 * 64, count=1, global_batch=64, place=Place())[0])
    assert places.lane.tolist() == list(range(64))
    assert len(set(places.shard.tolist())) >= 60  # 64 distant places of a line of 100 shards


# ----------------------------------------------------------------------- quality of the permutation
@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000, 1024, 1025])
def test_permute_is_a_bijection_for_every_key(size):
    x = np.arange(size, dtype=np.int64)
    for key in range(50):
        y = permute(x, np.full(size, size), np.full(size, key, dtype=np.uint64))
        assert sorted(y.tolist()) == x.tolist()


def chi2_per_degree(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum() / (counts.size - 1))


@pytest.mark.parametrize("size", [16, 24, 64, 100])
def test_every_place_gets_every_row_equally_often(size):
    """Over 20,000 keys each (place, row) pair comes equally often: chi-square a degree of freedom
    is 1 within 5 sigma.
    """
    keys = mix(np.arange(20_000, dtype=np.uint64))
    counts = np.zeros((size, size))
    for x in range(size):
        y = permute(np.full(keys.size, x), np.full(keys.size, size), keys)
        counts[x] = np.bincount(y, minlength=size)
    degrees = (size - 1) ** 2
    assert abs(chi2_per_degree(counts) * (size * size - 1) / degrees - 1) < 5 * np.sqrt(2 / degrees)


@pytest.mark.parametrize("size", [64, 1024])
def test_neighbours_are_torn_apart(size):
    """The image of x + 1, seen from that of x, is uniform over the other places: no low bit
    survives.
    """
    keys = mix(np.arange(40_000, dtype=np.uint64))
    x = (mix(keys) % np.uint64(size - 1)).astype(np.int64)
    domain = np.full(keys.size, size)
    gap = (permute(x + 1, domain, keys) - permute(x, domain, keys)) % size
    counts = np.bincount(gap, minlength=size)
    assert counts[0] == 0
    assert abs(chi2_per_degree(counts[1:]) - 1) < 5 * np.sqrt(2 / (size - 2))


@pytest.mark.parametrize("bits", [6, 10])
def test_every_input_bit_moves_every_output_bit(bits):
    """Avalanche: flipping any bit of x or of the key flips each output bit in half of the cases."""
    rng = np.random.default_rng(1)
    n, size = 30_000, 1 << bits
    x, keys = rng.integers(0, size, n), rng.integers(0, 2**63, n).astype(np.uint64)
    y = permute(x, np.full(n, size), keys)
    changes = [permute(x ^ (1 << b), np.full(n, size), keys) for b in range(bits)]
    changes += [permute(x, np.full(n, size), keys ^ np.uint64(1 << b)) for b in (0, 1, 31, 33, 62)]
    for changed in changes:
        flips = ((y ^ changed)[:, None] >> np.arange(bits) & 1).mean(axis=0)
        # 10 sigma of the sample; a bijection of 64 values is off by 0.008 itself
        assert np.abs(flips - 0.5).max() < 0.03


@pytest.mark.parametrize("changed", range(3))
@pytest.mark.parametrize("bit", [0, 1, 7, 20, 40])
def test_every_bit_of_a_seed_an_epoch_or_a_block_moves_every_bit_of_its_key(changed: int, bit: int):
    """Seeds, epochs and blocks are small numbers that differ in low bits: 1 and 2 must give keys as
    unlike as any.
    """
    flips = np.zeros(64)
    for number in range(500):
        words = [number, number % 7, 1 + number % 4]
        other = [word ^ (1 << bit if place == changed else 0) for place, word in enumerate(words)]
        # of a block, as `Order.locate` makes it
        keys = mix(np.array([number << 43 | 1024 * number], np.uint64) ^ key_of(*words)) ^ mix(
            np.array([number << 43 | 1024 * number], np.uint64) ^ key_of(*other)
        )
        flips += keys >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    assert np.abs(flips / 500 - 0.5).max() < 0.13  # 64 bits of 500 draws each: 5.8 sigma


@pytest.fixture(scope="module")
def epochs_of_blocks() -> np.ndarray:
    """Which row of its block stands at each place, for 8 epochs of 3 seeds (blocks x 256 places):
    as a run meets them.
    """
    blocks = []
    for seed in range(3):
        order = Order([2048] * 8, seed=seed, lanes=8, block=256)
        places = order.locate(np.arange(8 * order.rows))
        ordinal = np.array([np.argsort(order._epoch(epoch).shards) for epoch in range(8)])[
            places.epoch, places.shard
        ]
        # one lane's block a line
        line = (ordinal * 2048 + places.row).reshape(8, 2048, 8).transpose(0, 2, 1).reshape(-1, 256)
        blocks.append(line % 256)
    return np.concatenate(blocks)


def test_adjacent_rows_stay_adjacent_no_more_often_than_chance(epochs_of_blocks: np.ndarray):
    size, n = 256, len(epochs_of_blocks)
    steps = np.diff(epochs_of_blocks, axis=1)
    for step in (1, -1, 2, -2, 128):
        # of size * (size - 1) ordered pairs, size - |step| differ by it; size - 1 pairs a block
        expected = n * (size - abs(step)) / size
        assert abs((steps == step).sum() - expected) < 5 * np.sqrt(expected)


def test_places_and_rows_are_not_correlated(epochs_of_blocks: np.ndarray):
    rows = epochs_of_blocks - epochs_of_blocks.mean()
    for lag in (1, 2, 3, 7, 16, 64, 128):
        serial = (rows[:, lag:] * rows[:, :-lag]).mean() / rows.var()
        pairs = rows[:, lag:].size
        # drawn without replacement: -1 / (size - 1)
        assert abs(serial + 1 / 255) < 5 / np.sqrt(pairs)
    # of the same places of two blocks in a row
    between = np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]
    assert abs(between) < 5 / np.sqrt(rows[1:].size)


def test_every_row_comes_at_every_place_of_a_block_equally_often(epochs_of_blocks: np.ndarray):
    """Chi-square over (16 places x 16 rows) of a run's own blocks, and of the first place alone
    over all 256 rows.
    """
    coarse = np.zeros((16, 16))
    for place in range(256):
        coarse[place // 16] += np.bincount(epochs_of_blocks[:, place] // 16, minlength=16)
    degrees = 15 * 15
    assert abs(chi2_per_degree(coarse) * 255 / degrees - 1) < 5 * np.sqrt(2 / degrees)
    for place in (0, 1, 128, 255):
        assert abs(
            chi2_per_degree(np.bincount(epochs_of_blocks[:, place], minlength=256)) - 1
        ) < 5 * np.sqrt(2 / 255)


def test_blocks_of_lanes_and_epochs_are_permuted_apart():
    order = Order([4096], seed=9, lanes=4, block=64)
    places = order.locate(np.arange(2 * 4096))
    # (epoch, lane, block) x place
    line = places.row.reshape(2, 1024, 4).transpose(0, 2, 1).reshape(2 * 4 * 16, 64)
    within = line % 64
    assert len({tuple(b) for b in within.tolist()}) == 128  # no two blocks alike
    corr = np.corrcoef(within)
    assert np.abs(corr[np.triu_indices(128, 1)]).max() < 0.62  # 8128 pairs of 64: 5 sigma of chance


# ---------------------------------------------------------------------------------- size and errors
def test_a_trillion_tokens_start_at_once():
    """100,000 shards, 1e12 tokens, 4,096 ranks, at 50 %: in little memory, whatever the position
    (its time: benchmarks/stream.py).
    """
    shard_rows = np.full(100_000, 9765) + np.arange(100_000) % 7
    tracemalloc.start()
    order = order_of(shard_rows, seed=1, lanes="auto", block=1024)
    positions = order.steps(order.rows // 2, count=1, global_batch=8192, place=Place(4095, 4096))[0]
    places = order.locate(positions)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert order.rows * 1024 > 1e12 and (places.row < shard_rows[places.shard]).all()


def test_a_trillion_tokens_exactly_once_in_a_window():
    """Whole blocks of one lane of a huge run are permutations of the rows they stand for."""
    order = Order(np.full(100_000, 9765), seed=1, lanes=256, block=1024)
    lane, block = 77, 1234
    i = np.arange(block * 1024, (block + 1) * 1024)
    places = order.locate(i * 256 + lane)
    assert len(set(zip(places.shard.tolist(), places.row.tolist()))) == 1024
    assert len(set(places.shard.tolist())) <= 2


def test_lanes():
    assert resolve_lanes("auto", 10) == 1  # one block: a full permutation
    assert resolve_lanes("auto", 6000) == 6
    assert resolve_lanes("auto", 10**9) == 256
    assert resolve_lanes(64, 64) == 64
    with pytest.raises(ConfigError, match="more lanes than rows.*\n.*data.lanes.*\n.*65"):
        resolve_lanes(65, 64)
    with pytest.raises(DataError, match="no rows"):
        Order([0, 0], seed=1, lanes=1, block=1)
