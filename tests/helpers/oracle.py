"""The order of a run as one process would find it with paper and pencil: every row of an epoch laid
out in lists, every block counted.

Written from docs/data.md and the papers alone, in Python's integers, and slow on purpose. It shares
no code with ``hfscale/stream``: where both agree, the closed forms, the array arithmetic and the
dealing to ranks are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

WORD = 2**64 - 1
Stages = Sequence[tuple[int, Sequence[float]]]


def splitmix64(x: int) -> int:
    """Steele et al. 2014, figure 17, with x as the state before the step."""
    z = (x + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


@cache
def key(*words: int) -> int:
    return splitmix64(key(*words[:-1]) ^ words[-1]) if words else 0


def permuted(size: int, name: int) -> list[int]:
    """Return the image of 0 .. size - 1: six Feistel rounds over the smallest power of two, walked
    until it falls inside.
    """
    bits = (size - 1).bit_length()
    low = bits - bits // 2

    def once(x: int) -> int:
        left, right = x >> low, x & (1 << low) - 1
        for turn in range(6):
            if turn % 2 == 0:
                left ^= splitmix64(name ^ (right | turn << 32)) & (1 << bits // 2) - 1
            else:
                right ^= splitmix64(name ^ (left | turn << 32)) & (1 << low) - 1
        return left << low | right

    images = []
    for x in range(size):
        y = once(x)
        while y >= size:
            y = once(y)
        images.append(y)
    return images


def epoch(
    shard_rows: Sequence[int], *, seed: int, lanes: int, block: int, number: int
) -> list[tuple[int, int]]:
    """Return (shard, row) of every row of an epoch, in the order in which they are read."""
    shards = sorted(range(len(shard_rows)), key=lambda s: (splitmix64(s ^ key(seed, number, 1)), s))
    line = [(shard, row) for shard in shards for row in range(shard_rows[shard])]
    sizes = [len(line) // lanes + (lane < len(line) % lanes) for lane in range(lanes)]
    cut = []
    for lane, size in enumerate(sizes):
        rows, line = line[:size], line[size:]
        parts = [(first, rows[first : first + block]) for first in range(0, size, block)]
        cut.append(
            [
                part[image]
                for first, part in parts
                for image in permuted(
                    len(part), splitmix64((lane << 43 | first) ^ key(seed, number, 2))
                )
            ]
        )
    return [lane[i] for i in range(max(sizes)) for lane in cut if i < len(lane)]


@dataclass
class Corpus:
    """One source, read epoch after epoch from its first row on."""

    shard_rows: Sequence[int]
    seed: int
    lanes: int
    block: int
    taken: int = 0
    _epochs: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def read(self, count: int) -> list[tuple[int, int]]:
        """Return the next ``count`` rows."""
        rows, n = [], sum(self.shard_rows)
        for at in range(self.taken, self.taken + count):
            if at // n not in self._epochs:
                self._epochs = {
                    at // n: epoch(
                        self.shard_rows,
                        seed=self.seed,
                        lanes=self.lanes,
                        block=self.block,
                        number=at // n,
                    )
                }
            rows.append(self._epochs[at // n][at % n])
        self.taken += count
        return rows


def source_seed(seed: int, number: int) -> int:
    """Return the seed of a run's source ``number``: the first one has the run's, as if it were
    alone.
    """
    return key(seed, number, 3) if number else seed


def shares(weights: Sequence[float], size: int, left: Sequence[float]) -> list[int]:
    """Return the rows of each source in a block, handed out one by one: the largest remainder
    first, none more than it has left.
    """
    fixed: dict[int, int] = {}
    while True:
        open_ = [s for s, weight in enumerate(weights) if weight > 0 and s not in fixed]
        rest = size - sum(fixed.values())
        if not open_:
            return [fixed.get(s, 0) for s in range(len(weights))]
        quota = {
            s: rest * Fraction(weights[s]) / sum(Fraction(weights[o]) for o in open_) for s in open_
        }
        got = {s: quota[s].numerator // quota[s].denominator for s in open_}
        for s in sorted(open_, key=lambda s: (got[s] - quota[s], s))[: rest - sum(got.values())]:
            got[s] += 1
        over = {s: int(left[s]) for s in open_ if left[s] < got[s]}
        if not over:
            return [(fixed | got).get(s, 0) for s in range(len(weights))]
        fixed |= over


def run(
    corpora: Sequence[Corpus],
    *,
    seed: int,
    block: int,
    attempts: Sequence[tuple[int, Stages, Sequence[float]]],
    rows: int,
) -> Iterator[tuple[int, int, int]]:
    """Yield (source, shard, row) of the first ``rows`` rows of a run, or as many as the caps leave.

    An attempt is (rows consumed when it began, stages as (first row, weights), most rows of each
    source): it counts from the end of the block under way, and in its own first row if that is
    where one ends.
    """
    at = 0
    while at < rows:
        _, stages, caps = [attempt for attempt in attempts if attempt[0] <= at][-1]
        weights = [weights for first, weights in stages if first <= at][-1]
        size = min([block, *(first - at for first, _ in stages if first > at)])
        counts = shares(
            weights,
            size,
            [max(0, cap - corpus.taken) for cap, corpus in zip(caps, corpora, strict=True)],
        )
        size = sum(counts)
        if size == 0:
            return
        slots = [
            (source, *row)
            for source, (count, corpus) in enumerate(zip(counts, corpora, strict=True))
            for row in corpus.read(count)
        ]
        alone = max(counts) == size  # nothing to mix
        yield from (
            slots[image]
            for image in (range(size) if alone else permuted(size, splitmix64(at ^ key(seed, 4))))
        )
        at += size
