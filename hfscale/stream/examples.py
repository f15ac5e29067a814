"""Labelled examples as a stream of micro-batches: any step of any epoch on any number of ranks,
batched by length.

The only cursor is P, the features consumed so far; which feature stands at P is a pure function of
(lengths, seed, P). An epoch of N features is permuted as a whole (``order.py``) and cut into pools
of POOL; a pool is sorted by length and cut into groups of GROUP, which are permuted, and so is each
in itself. So each feature comes once an epoch, neighbours are about equally long, and the order
depends on neither ranks nor batches. A step takes the next ``global_batch`` features, sorts them by
length and deals micro-batches to the ranks.

Shape legend: B features of a micro-batch, n of those asked for, N of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from hfscale.dist.world import Place
from hfscale.errors import DataError
from hfscale.monitor.incidents import Place as DataPlace
from hfscale.stream.left_out import LeftOut, Span, merged
from hfscale.stream.order import Order, key_of, mix

if TYPE_CHECKING:  # so that checks on the login node need no torch
    from datasets import Dataset
    from torch import Tensor

POOL, GROUP = 4096, 64  # features: what is sorted together, and stays together
_POOLS = 5  # purpose of a key; order.py and mixture.py have the others


# of a stranger's table: who reads it looks what it is
Cell = Any
# role -> cell, and "id": str; an optional role or an unknown answer is not there
Example = dict[str, Cell]
# what a task makes of it, for ``collate``: "input_ids" and so on; "truncated": True is counted
Feature = dict[str, Any]


class Facts(TypedDict, total=False):
    """What the examples of a training split say of a task, or the config of a finished model."""

    labels: list[str]  # in the model's order
    problem: str  # in transformers' words
    counts: list[int]  # how often each label occurs
    no_answer: bool  # some questions have none
    repeated: int  # examples of which a text was there before


class BadExample(ValueError):
    """An example that nothing can be learnt or predicted from; the message says why, for people."""


@dataclass
class Examples:
    """One micro-batch as it leaves the stream, on the CPU; the loop treats it like ``Rows``."""

    # B, as the task made them, and "example": the number of the example in its split
    features: list[Feature]
    valid_B: Tensor  # bool: False marks a filler row, which is not scored
    source_B: Tensor  # int16: 0
    position: Tensor  # int64 (B,): the row's place in the order of the run, or in the split


@dataclass(frozen=True)
class ExampleState:
    """Where a stream stands, and what must be the same for that to mean anything."""

    fingerprint: str  # of the features
    seed: int
    grouped: bool
    epoch_rows: int
    consumed_rows: int = 0
    left_out: tuple[Span, ...] = ()  # rows that the run leaves out (left_out.py)

    def to_dict(self) -> dict[str, object]:
        content = asdict(self)
        if not self.left_out:
            del content["left_out"]
        return content


class ExampleOrder:
    """Which feature stands at each position of a run; ``lengths`` (N) are in tokens."""

    def __init__(self, lengths: np.ndarray, *, seed: int, grouped: bool) -> None:
        self.lengths, self.seed, self.grouped = lengths, seed, grouped
        self._order = Order([len(lengths)], seed=seed, lanes=1, block=len(lengths))
        self._pool = lru_cache(4)(self._permuted)

    def at(self, start: int, count: int) -> np.ndarray:
        """Return the numbers of the features at positions ``start .. start + count`` (n; int64)."""
        parts, N = [], len(self.lengths)
        while count > 0:
            epoch, place = divmod(start, N)
            found = self._pool(epoch, place // POOL)[place % POOL :][:count]
            parts.append(found)
            start, count = start + len(found), count - len(found)
        return np.concatenate(parts)

    def _permuted(self, epoch: int, number: int) -> np.ndarray:
        """Return the features of a pool of an epoch, in their order."""
        N = len(self.lengths)
        rows = self._order.locate(
            epoch * N + np.arange(number * POOL, min(N, (number + 1) * POOL))
        ).row
        if self.grouped:
            key = key_of(self.seed, epoch, _POOLS, number)
            by_length = np.argsort(self.lengths[rows], kind="stable")
            # cut elsewhere in each epoch
            groups = np.split(by_length, range(int(key[0]) % GROUP, len(rows), GROUP))
            turns = np.argsort(mix(np.arange(len(groups), dtype=np.uint64) ^ key))
            # a group itself is in no order of length
            rows = rows[np.concatenate([np.sort(groups[turn]) for turn in turns])]
        return rows


class ExampleStream:
    """This rank's micro-batches of each step, from any state on, on any number of ranks.
    ``features`` is a ``datasets.Dataset``.

    Raises:
        DataError: if ``state`` is of other examples, or of another order.
    """

    def __init__(
        self,
        features: Dataset | Sequence[Feature],
        order: ExampleOrder,
        *,
        fingerprint: str,
        global_batch: int,
        micro_batch: int,
        place: Place,
        state: Mapping[str, object] | None = None,
    ) -> None:
        self._features, self._order, self._place = features, order, place
        self._global_batch, self._micro_batch = global_batch, micro_batch
        state = state or {}
        consumed, left_out = state.get("consumed_rows"), state.get("left_out")
        self._state = ExampleState(
            fingerprint,
            order.seed,
            order.grouped,
            len(order.lengths),
            consumed if isinstance(consumed, int) else 0,
            left_out=tuple(merged(left_out if isinstance(left_out, list | tuple) else ())),
        )
        differ = [
            f"{name}: {state.get(name)} in the checkpoint, {now} now"
            for name, now in self._state.to_dict().items()
            if state and name != "left_out" and state.get(name) != now
        ]
        if differ:
            raise DataError(
                "the checkpoint continues other examples, or another order of them",
                where="; ".join(differ),
                remedy="give back the files and options of data (and the hfscale of then), or "
                "start a new run: run.name=...",
            )
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="stream-reader")
        self._next = self._reader.submit(self._read, self._state.consumed_rows)

    def take(self) -> list[Examples]:
        """Return this rank's micro-batches of the next step; until ``advance`` the same again."""
        return self._next.result()

    def advance(self) -> None:
        """Return with the taken step counted as consumed: its optimizer step is complete."""
        self._state = replace(
            self._state, consumed_rows=self._state.consumed_rows + self._global_batch
        )
        self._next = self._reader.submit(self._read, self._state.consumed_rows)

    def rewind(
        self, content: Mapping[str, object], *, left_out: Iterable[Span], at: int | None = None
    ) -> None:
        """Return with the stream where a checkpoint's ``content`` (``state().to_dict()``) has it,
        or at row ``at``, and without the rows that are ``left_out``.
        """
        start = content["consumed_rows"] if at is None else at
        assert isinstance(start, int), start
        self._state = replace(self._state, consumed_rows=start, left_out=tuple(merged(left_out)))
        self._next = self._reader.submit(self._read, self._state.consumed_rows)

    @property
    def step_rows(self) -> Span:
        """The positions of the step that comes next, or is taken."""
        first = self._state.consumed_rows
        return first, first + self._global_batch

    @property
    def ledger(self) -> LeftOut:
        """The rows that the run leaves out."""
        return LeftOut(self._state.left_out)

    def places(self, rows: Span) -> list[DataPlace]:
        """Return nothing: a row is an example, not a place in a shard."""
        return []

    def state(self) -> ExampleState:
        """Return where the stream stands: after the steps that were completed by ``advance``."""
        return self._state

    def epochs(self) -> dict[str, float]:
        """Return the passes over the examples so far."""
        return {"epoch": self._state.consumed_rows / self._state.epoch_rows}

    def close(self) -> None:
        """Return with the reader thread ended. The stream can no longer be taken from."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, start: int) -> list[Examples]:
        numbers = self._order.at(start, self._global_batch)
        positions = start + np.arange(self._global_batch)
        by_length = (
            np.argsort(self._order.lengths[numbers], kind="stable")
            if self._order.grouped
            else np.arange(len(numbers))
        )
        numbers, positions = numbers[by_length], positions[by_length]
        width = self._micro_batch
        firsts = range(self._place.rank * width, self._global_batch, self._place.size * width)
        kept = ~LeftOut(self._state.left_out).mask(positions)
        cuts = [slice(first, first + width) for first in firsts]
        return [
            micro_batch(self._features, numbers[cut], positions[cut], valid=kept[cut])
            for cut in cuts
        ]


class ExampleRows:
    """All features of a split once, longest last: whole micro-batches, as many on each rank, the
    last filled up with rows not valid.
    """

    def __init__(
        self,
        features: Dataset | Sequence[Feature],
        lengths: np.ndarray,
        *,
        micro_batch: int,
        place: Place,
    ) -> None:
        self._features = features
        self._by_length = np.argsort(lengths, kind="stable")
        self._micro_batch = micro_batch
        self._place = place

    def __iter__(self) -> Iterator[Examples]:
        """Yield this rank's micro-batches; ``position`` is the number of the feature."""
        n, turn = len(self._by_length), self._place.size * self._micro_batch
        for first in range(self._place.rank * self._micro_batch, -(-n // turn) * turn, turn):
            places = np.arange(first, first + self._micro_batch)
            numbers = self._by_length[np.minimum(places, n - 1)]
            yield micro_batch(self._features, numbers, numbers, valid=places < n)


def micro_batch(
    features: Dataset | Sequence[Feature],
    numbers: np.ndarray,
    positions: np.ndarray,
    valid: np.ndarray | None = None,
) -> Examples:
    """Return features ``numbers`` (B) of a ``datasets.Dataset``, or of a list, as a micro-batch."""
    import torch

    if isinstance(features, Sequence):
        rows = [features[number] for number in numbers]
    else:
        columns = features[numbers.tolist()]
        rows = [
            dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
        ]
    # Arrow has every name in every row
    rows = [{name: cell for name, cell in row.items() if cell is not None} for row in rows]
    valid = np.ones(len(numbers), bool) if valid is None else valid
    source_B = torch.zeros(len(numbers), dtype=torch.int16)
    return Examples(
        rows, torch.from_numpy(valid), source_B, torch.from_numpy(positions.astype(np.int64))
    )
