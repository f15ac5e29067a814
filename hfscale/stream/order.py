"""Which row of which shard stands at every position of a run: a pure function of (shard sizes,
seed, position).

The only cursor of a run is P, the rows consumed so far. Worked example: 3 shards of 5, 2 and 6 rows
(N = 13), lanes C = 4, block M = 2:

    P = 30  ->  epoch 2, p = 30 % 13 = 4  ->  lane 4 % 4 = 0, its row number i = 4 // 4 = 1
    epoch 2 reads the shards in an order of its own, say (6, 5, 2 rows);
    that line of 13 rows is cut into lanes of 4, 3, 3, 3 rows; lane 0 is cut into blocks of 2;
    i = 1 lies in block 0, whose 2 rows are permuted -> say row 0 of the lane -> row 0 of shard 2.

Nothing of size N is ever built, so any position of any run is found in the same few microseconds,
and how a step is dealt to ranks cannot change what the step holds. Consecutive positions come from
consecutive lanes, that is from C distant places.

Shape legend: n positions asked for; S shards. All arrays are int64 outside this module, uint64 in
the bit mixing. Sources: Steele et al. 2014, Fast splittable pseudorandom number generators
(splitmix64); Luby & Rackoff 1988 (Feistel networks); Black & Rogaway 2002, Ciphers with arbitrary
finite domains (cycle walking).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Union

import numpy as np

from hfscale.dist.world import Place
from hfscale.errors import ConfigError, DataError

AUTO_LANES = (
    256  # at most, where lanes are "auto": half of the shards that a process keeps open (rows.py)
)
# of the Feistel network: 4 are the least that look random from both sides, 6 leave a margin for
# small blocks
ROUNDS = 6
_SHARDS, _BLOCKS = 1, 2  # purposes of a key, so that two permutations of an epoch never share one


@dataclass(frozen=True)
class Places:
    """Where n positions lie: four int64 arrays of length n."""

    epoch: np.ndarray
    lane: np.ndarray
    shard: np.ndarray
    row: np.ndarray


@dataclass(frozen=True)
class _Epoch:
    """The line of an epoch: its shards in order, where each begins and ends in the line (all S),
    and the key of its blocks.
    """

    shards: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    key: np.uint64


def resolve_lanes(lanes: Union[Literal["auto"], int], rows: int, *, block: int = 1024) -> int:
    """Return the number of lanes of a run over ``rows`` rows an epoch.

    ``auto`` gives every lane at least a block, up to AUTO_LANES: data of up to one block are
    permuted as a whole.

    Raises:
        ConfigError: if there would be more lanes than rows.
    """
    if lanes == "auto":
        return min(AUTO_LANES, -(-rows // block))
    if lanes > rows:
        raise ConfigError(
            "more lanes than rows of an epoch",
            where="data.lanes",
            value=lanes,
            remedy=f"a source holds only {rows:,} rows of data.seq_len tokens: give at most "
            "that, or auto",
        )
    return int(lanes)


class Order:
    """The order in which the rows of S shards are read, epoch after epoch."""

    def __init__(
        self,
        shard_rows: Sequence[int] | np.ndarray,
        *,
        seed: int,
        lanes: Union[Literal["auto"], int],
        block: int,
    ) -> None:
        self.shard_rows = np.asarray(shard_rows, dtype=np.int64)
        self.rows = int(self.shard_rows.sum())  # N: rows of one epoch
        if self.rows == 0:
            raise DataError(
                "no rows to order: every shard is empty or shorter than a row", where="data.sources"
            )
        self.seed = seed
        self.block = block
        self.lanes = resolve_lanes(lanes, self.rows, block=block)
        self._epoch = lru_cache(4)(self._lay_out)  # a run goes from one to the next

    def locate(self, positions: np.ndarray) -> Places:
        """Return the places of ``positions`` (n, int64, in any order, of any epochs)."""
        epoch, p = np.divmod(positions, self.rows)
        i, lane = np.divmod(p, self.lanes)
        # the first `longer` lanes hold one row more than `short`
        short, longer = divmod(self.rows, self.lanes)
        first = i // self.block * self.block  # of its block, counted in the lane
        size = np.minimum(self.block, short + (lane < longer) - first)
        earliest = int(epoch.min())
        layouts = [self._epoch(e) for e in range(earliest, int(epoch.max()) + 1)]
        # its name in the epoch: no lane has 2**43 rows
        block = (lane << 43 | first).astype(np.uint64)
        line = lane * short + np.minimum(lane, longer) + first
        if self.block > 1:
            keys = mix(block ^ np.array([layout.key for layout in layouts])[epoch - earliest])
            line += permute(i - first, size, keys)
        shard, row = np.empty_like(p), np.empty_like(p)
        for e, layout in enumerate(layouts, start=earliest):
            at = np.flatnonzero(epoch == e)
            ordinal = np.searchsorted(layout.ends, line[at], side="right")
            shard[at] = layout.shards[ordinal]
            row[at] = line[at] - layout.begins[ordinal]
        return Places(epoch, lane, shard, row)

    def _lay_out(self, epoch: int) -> _Epoch:
        names = np.arange(len(self.shard_rows), dtype=np.uint64)
        shards = np.argsort(mix(names ^ key_of(self.seed, epoch, _SHARDS)), kind="stable")
        ends = np.cumsum(self.shard_rows[shards])
        return _Epoch(
            shards, ends - self.shard_rows[shards], ends, key_of(self.seed, epoch, _BLOCKS)[0]
        )


def deal(positions: np.ndarray, lanes: np.ndarray, *, place: Place) -> np.ndarray:
    """Return the share of ``place`` in each step (count, global_batch / place.size) of
    ``positions``, whose ``lanes`` are alike in shape.
    """
    by_lane = np.argsort(lanes, axis=1, kind="stable")
    share = positions.shape[1] // place.size
    first = place.rank * share
    return np.take_along_axis(positions, by_lane[:, first : first + share], axis=1)


def mix(x: np.ndarray) -> np.ndarray:
    """Return splitmix64 of each uint64: a bijection in which every input bit moves every output
    bit.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def permute(x: np.ndarray, size: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return, for each x in [0, size), its image under the permutation of [0, size) that its key
    names (n; int64, keys uint64).
    """
    size = size.astype(np.uint64)
    # the smallest power of two that covers the domain
    _, bits = np.frexp((size - np.uint64(1)).astype(np.float64))
    y = _feistel(x.astype(np.uint64), bits.astype(np.uint64), keys)
    while (
        outside := np.flatnonzero(y >= size)
    ).size:  # cycle walking: less than two rounds on average
        y[outside] = _feistel(y[outside], bits[outside].astype(np.uint64), keys[outside])
    return y.astype(np.int64)


def _feistel(x: np.ndarray, bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the image of x under a keyed permutation of [0, 2**bits); the halves are mixed in
    turn, and need not be of one width.
    """
    one = np.uint64(1)
    left_bits = bits >> one
    right_bits = bits - left_bits
    masks = (one << left_bits) - one, (one << right_bits) - one
    halves = [x >> right_bits, x & masks[1]]
    for turn in range(ROUNDS):
        other = halves[1 - turn % 2] | np.uint64(turn << 32)
        halves[turn % 2] ^= mix(other ^ keys) & masks[turn % 2]
    image: np.ndarray = halves[0] << right_bits | halves[1]
    return image


def key_of(*words: int) -> np.ndarray:
    """Return a uint64 key (1,) of the words; every word, and its place, moves every bit."""
    key = np.zeros(1, dtype=np.uint64)
    for word in words:
        key = mix(key ^ np.uint64(word))
    return key
