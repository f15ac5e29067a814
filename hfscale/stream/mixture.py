"""Many sources in one order: blocks with a fixed number of rows of each source, permuted by a key
of their own.

Worked example: web 0.7 and code 0.3 in blocks of M = 10 rows, that is 7 and 3 rows a block. P = 25
is place 5 of the block that begins at 20. Say that block's permutation puts slot 8 there; slots 0-6
are web's and 7-9 code's, so this is row 2 * 3 + (8 - 7) = 7 of code's own order (``order.py``): two
blocks came before it. Nothing is counted along the way.

A *phase* is a stretch of blocks alike: where it begins (in rows of the run), and the rows of each
source in one block. A new one begins

- exactly where a stage of the config begins: the block before it is cut short;
- where a source has given its ``max_epochs``: its last block holds just what is left of it, the
  others share the rest by weight;
- at the first end of a block after a resume with other weights or more sources: what was is
  recorded in the state of the stream.

Shape legend: n positions asked for; S sources; F phases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, TypedDict

import numpy as np

from hfscale.dist.world import Place
from hfscale.stream.order import Order, Places, deal, key_of, mix, permute
from hfscale.stream.state import Cursors

_SLOTS = 4  # purpose of a key; order.py and sources.py have the others


class Phase(NamedTuple):
    """Blocks alike, from row ``begin`` of the run on: ``counts`` are the rows of each source in one
    block.
    """

    begin: int
    counts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Rows of a block."""
        return sum(self.counts)


ALONE = Phase(0, (1,))  # of a run over one source
# (first row of the run, weight of each source); the first stage begins at row 0
Stages = Sequence[tuple[int, Sequence[float]]]


def share(weights: Sequence[float], size: int, left: Sequence[int | None]) -> tuple[int, ...]:
    """Return the rows of each source in a block of ``size``: largest remainder, but of no source
    more than it has ``left``.

    What such a source lacks goes to the others by their weights; the sum is below ``size`` only
    where all with a weight are used up.
    """
    counts, sharing = [0] * len(weights), [s for s, weight in enumerate(weights) if weight > 0]
    while sharing:
        rest, total = size - sum(counts), sum(Fraction(weights[s]) for s in sharing)
        exact = {s: Fraction(weights[s]) * rest / total for s in sharing}
        by_remainder = sorted(sharing, key=lambda s: (exact[s] // 1 - exact[s], s))
        longer = set(by_remainder[: rest - sum(int(x) for x in exact.values())])
        given = {s: int(exact[s]) + (s in longer) for s in sharing}
        short = {s: most for s in sharing if (most := left[s]) is not None and most < given[s]}
        for s, n in (short or given).items():
            counts[s] = n
        sharing = [s for s in sharing if s not in short] if short else []
    return tuple(counts)


def plan(
    stages: Stages,
    *,
    block: int,
    caps: Sequence[int | None],
    past: Sequence[Phase] = (),
    consumed: int = 0,
) -> tuple[list[Phase], int | None]:
    """Return all phases of a run and the row at which it must end, every source used up (None:
    never).

    Up to the end of the block in which row ``consumed`` lies they are those of the ``past``; from
    there on they follow the arguments.
    """
    phases = [
        Phase(begin, (*counts, *[0] * (len(caps) - len(counts))))
        for begin, counts in past
        if begin < consumed
    ]
    # rounded up
    at = (
        phases[-1].begin - (phases[-1].begin - consumed) // phases[-1].size * phases[-1].size
        if phases
        else 0
    )
    used = [int(n) for n in _rows_before([*phases, Phase(at, (0,) * len(caps))])[-1]]
    while True:
        weights = [weights for row, weights in stages if row <= at][-1]
        until = min((row - at for row, _ in stages if row > at), default=None)
        size = block if until is None else min(block, until)
        left = [None if cap is None else max(0, cap - n) for cap, n in zip(caps, used, strict=True)]
        counts = share(weights, size, left)
        if not any(counts):
            return phases, at
        if not phases or phases[-1].counts != counts:
            phases.append(Phase(at, counts))
        repeats = [
            have // count
            for have, count in zip(left, counts, strict=True)
            if have is not None and count
        ]
        repeats += [] if until is None else [until // size]
        if not repeats:
            return phases, None
        at += min(repeats) * sum(counts)
        used = [n + min(repeats) * count for n, count in zip(used, counts, strict=True)]


def _rows_before(phases: Sequence[Phase]) -> np.ndarray:
    """Return how many rows of each source come before each phase (F, S)."""
    blocks = [(after.begin - phase.begin) // phase.size for phase, after in zip(phases, phases[1:])]
    counts = np.array([phase.counts for phase in phases], dtype=np.int64)
    return np.concatenate(
        [
            np.zeros_like(counts[:1]),
            np.cumsum(counts[:-1] * np.array(blocks, dtype=np.int64)[:, None], axis=0),
        ]
    )


class Mixed(TypedDict, total=False):
    """What the state of a stream says of its mixture (``StreamState``); one source has none."""

    sources: dict[str, tuple[str, int]]
    phases: list[tuple[int, list[int]]]


class Passes(TypedDict, total=False):
    """How often the data were gone through."""

    epoch: float
    source_epoch: dict[str, float]  # where there are several


class Mixture:
    """The order of a run over S sources; with one source it is that source's own.

    ``fingerprints`` names the sources and their data; shards are numbered through
    (``TokenRows.joined``). The order of a source of ``raw`` text is that of its samples; where its
    rows lie only ``text.py`` knows. With such a source lanes are of the run's positions.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        *,
        fingerprints: Mapping[str, str],
        phases: Sequence[Phase] = (ALONE,),
        end: int | None = None,
        raw: Sequence[int] = (),
    ) -> None:
        self.names = tuple(fingerprints)
        self.end = end
        self.fingerprints = fingerprints
        self._phases = phases
        self.seed = orders[0].seed
        self.block = orders[0].block
        self.lanes = orders[raw[0] if raw else 0].lanes
        self.orders, self.raw = orders, raw
        self._rows, self._lanes = (
            np.array([getattr(order, what) for order in orders]) for what in ("rows", "lanes")
        )
        self._first_shards = np.cumsum([0, *(len(order.shard_rows) for order in orders)])
        self.rows = int(self._rows.sum())  # one epoch: as many rows as all sources hold
        self._begins = np.array([phase.begin for phase in phases], dtype=np.int64)
        self._counts = np.array([phase.counts for phase in phases], dtype=np.int64)
        self._ends = np.cumsum(self._counts, axis=1)  # slots of a block
        self._before = _rows_before(phases)
        self._key = key_of(self.seed, _SLOTS)

    @property
    def fingerprint(self) -> str:
        """What names all the data."""
        prints = list(self.fingerprints.values())
        return (
            prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()
        )

    def place(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each position (n), and the place of its row in that source's own
        order (n).
        """
        if self.end is not None:
            # what is read ahead of the end is never trained on
            positions = np.minimum(positions, self.end - 1)
        if len(self.orders) == 1:
            return np.zeros_like(positions), positions
        phase = np.searchsorted(self._begins, positions, side="right") - 1
        size = self._ends[phase, -1]
        block, slot = np.divmod(positions - self._begins[phase], size)
        if (mixed := np.flatnonzero(self._counts.max(axis=1)[phase] < size)).size:
            begin = (positions - slot)[mixed].astype(np.uint64)  # names the block
            slot[mixed] = permute(slot[mixed], size[mixed], mix(begin ^ self._key))
        source = (slot[:, None] >= self._ends[phase]).sum(axis=1)
        count = self._counts[phase, source]
        return source, self._before[phase, source] + block * count + slot - (
            self._ends[phase, source] - count
        )

    def steps(self, start: int, *, count: int, global_batch: int, place: Place) -> np.ndarray:
        """Return the positions (count, global_batch / place.size) that this rank reads in ``count``
        steps from ``start`` on.

        A step takes ``global_batch`` positions in a row; they are sorted by lane and cut into
        ``place.size`` equal slices, so where lanes divide the global batch a rank stays with its
        lanes' shards. Whatever the slices, the step is the same.
        """
        positions = start + np.arange(count * global_batch, dtype=np.int64)
        if self.raw:
            lane = positions % self.lanes
        else:
            source, cursor = self.place(positions)
            lane = source << 40 | cursor % self._rows[source] % self._lanes[source]
        return deal(
            positions.reshape(count, global_batch),
            lane.reshape(count, global_batch),
            place=place,
        )

    def locate(self, positions: np.ndarray) -> Places:
        """Return the places of ``positions`` (n); epochs and lanes are those of each row's source.
        For raw text: its first shard.
        """
        source, cursor = self.place(positions)
        if len(self.orders) == 1 and not self.raw:
            return self.orders[0].locate(cursor)
        places = Places(*(np.zeros_like(positions) for _ in range(4)))
        for number, order in enumerate(self.orders):
            if (at := np.flatnonzero(source == number)).size and number in self.raw:
                places.shard[at] = self._first_shards[number]
            elif at.size:
                found = order.locate(cursor[at])
                places.epoch[at] = found.epoch
                places.lane[at] = found.lane
                places.row[at] = found.row
                places.shard[at] = found.shard + self._first_shards[number]
        return places

    def consumed(self, position: int) -> np.ndarray:
        """Return how many rows of each source (S) come before ``position``."""
        phase = int(np.searchsorted(self._begins, position, side="right")) - 1
        block, slot = divmod(position - int(self._begins[phase]), int(self._ends[phase, -1]))
        source, _ = self.place(np.arange(position - slot, position))
        in_block = np.bincount(source, minlength=len(self.orders))
        rows: np.ndarray = self._before[phase] + block * self._counts[phase] + in_block
        return rows

    def epochs(self, position: int, cursors: Cursors | None = None) -> Passes:
        """Return the passes over all the data, and over each source where there are several; of raw
        text by the samples used up.
        """
        used = self.consumed(position)
        used[list(self.raw)] = [sum(sample for sample, _ in lanes) for lanes in cursors or ()]
        by_source = dict(zip(self.names, (used / self._rows).tolist(), strict=True))
        passes = Passes(epoch=int(used.sum()) / self.rows)
        if len(by_source) > 1:
            passes["source_epoch"] = by_source
        return passes

    def record(self, position: int) -> Mixed:
        """Return what the state of a stream must say of the mixture at ``position``: its sources,
        and the phases begun; one has none.
        """
        if len(self.orders) == 1:
            return {}
        rows = self.consumed(position).tolist()
        return {
            "sources": {
                name: (print_[:12], n)
                for (name, print_), n in zip(self.fingerprints.items(), rows, strict=True)
            },
            "phases": [
                (phase.begin, list(phase.counts))
                for phase in self._phases
                if phase.begin < position
            ],
        }
