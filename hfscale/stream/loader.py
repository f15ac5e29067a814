"""From positions to micro-batches: a thread of this process reads steps ahead into a ring of preallocated slabs.

A slab holds the rows of this rank for a few steps, so that the hand-over between threads (tens of microseconds) and the arithmetic
of the order are paid once a slab. The first slab is one step, the next two, then four ...: the first batch comes at once.

    reader thread:   free slab -> the next rows of the plan (order.steps, order.locate) -> rows.fill -> full slab
    training:        take() -> views into the slab;  advance() -> the step is done; after its last step the slab is free again

The state is the number of rows consumed. It moves in advance(), never at prefetch, so whatever the reader was ahead is read again.
Worker processes would cost about 1 ms a batch in hand-over alone.
"""
from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfscale.errors import DataError
from hfscale.stream.order import Order
from hfscale.stream.rows import Rows, TokenRows

if TYPE_CHECKING:
    from hfscale.stream.mixture import Mixture

SLAB_TOKENS = 2**19  # of a slab (4 MiB of ids), where a step is not larger
SLAB_STEPS = 64  # at most: more would not make the hand-over cheaper
PLAN_ROWS = 8192  # of all ranks that are placed at once, in whole steps: 0.1 us a row then, four times that for 256
STATE_VERSION = 1


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands, and what must be the same for that to mean anything. The same on all ranks; JSON under 1 kB."""

    fingerprint: str  # of the data
    seed: int
    seq_len: int
    lanes: int
    block: int
    epoch_rows: int
    consumed_rows: int = 0
    sources: dict[str, list[Any]] = field(default_factory=dict)  # of a mixture: name -> [start of the fingerprint, rows consumed]
    phases: list[list[Any]] = field(default_factory=list)  # of a mixture: those begun (mixture.py)
    version: int = STATE_VERSION

    @property
    def consumed_tokens(self) -> int:
        """Tokens trained on so far."""
        return self.consumed_rows * self.seq_len

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with the fraction of the one under way."""
        return self.consumed_rows / self.epoch_rows

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON types."""
        content = {**asdict(self), "consumed_tokens": self.consumed_tokens}
        return {name: value for name, value in content.items() if self.sources or name not in ("sources", "phases")}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StreamState:
        """Return the state that ``to_dict`` gave.

        Raises:
            DataError: if it is not of this version.
        """
        if content.get("version") != STATE_VERSION:
            raise DataError("a stream state of an unknown version", where="the checkpoint's state.json", value=content.get("version"),
                            remedy=f"this program reads version {STATE_VERSION}: resume with the version of hfscale that saved it")
        return cls(**{name: value for name, value in content.items() if name != "consumed_tokens"})


class Stream:
    """This rank's micro-batches of each step, from any state on, on any number of ranks.

    ``global_batch`` must divide by ``world_size * micro_batch``; the reader stays ``prefetch_steps`` ahead, or a slab where that is more.
    ``take`` and ``advance`` belong to one thread.

    Raises:
        DataError: if ``state`` is of other data or of another order; it names what differs.
    """

    def __init__(self, rows: TokenRows, order: Order | Mixture, *, global_batch: int, micro_batch: int, rank: int, world_size: int,
                 state: StreamState | None = None, prefetch_steps: int = 2, with_documents: bool = False, pin_memory: bool = False) -> None:
        assert global_batch % (world_size * micro_batch) == 0, (global_batch, world_size, micro_batch)  # rules.py has checked it
        self._rows, self._order = rows, order
        fresh = StreamState(rows.fingerprint, order.seed, rows.seq_len, order.lanes, order.block, order.rows)
        self._opened = replace(state or fresh, epoch_rows=order.rows)  # a source may have come to a mixture
        _check_same(fresh, self._opened)
        self._consumed = self._opened.consumed_rows
        self._global_batch, self._rank, self._world_size = global_batch, rank, world_size
        self._share = global_batch // world_size  # rows of this rank in a step
        slab_steps = max(1, min(SLAB_STEPS, SLAB_TOKENS // (self._share * rows.seq_len), PLAN_ROWS // global_batch))
        self._plan_steps = max(1, PLAN_ROWS // global_batch // slab_steps) * slab_steps
        slabs = 1 + -(-prefetch_steps // slab_steps)  # one being trained on, the others being filled
        self._slab_rows = slab_steps * self._share
        self._free: queue.SimpleQueue[_Slab | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[_Slab | BaseException] = queue.SimpleQueue()
        for _ in range(slabs):
            self._free.put(_Slab(slab_steps, self._share, micro_batch, length=rows.seq_len + 1, with_documents=with_documents,
                                 pin_memory=pin_memory))
        self._slab: _Slab | None = None  # being trained on
        self._step = 0  # of the slab
        self._error: BaseException | None = None
        self._reader = threading.Thread(target=self._read_ahead, args=(self._consumed,), name="stream-reader", daemon=True)
        self._reader.start()

    def take(self) -> list[Rows]:
        """Return this rank's micro-batches of the next step; until ``advance`` the same again. Their memory is reused after that.

        Raises:
            DataError: if the data is missing or damaged, or whatever else stopped the reader thread.
        """
        if self._error is not None:
            raise self._error
        if self._order.end is not None and self._consumed + self._global_batch > self._order.end:
            raise DataError("every source has given its max_epochs", where="data.sources", value=f"{self._order.end:,} rows")
        if self._slab is None:
            slab = self._full.get()
            if isinstance(slab, BaseException):
                self._error = slab
                raise slab
            self._slab, self._step = slab, 0
        return self._slab.batches[self._step]

    def advance(self) -> None:
        """Return with the taken step counted as consumed: its optimizer step is complete."""
        assert self._slab is not None, "advance() without take()"
        self._consumed += self._global_batch
        self._step += 1
        if self._step == self._slab.steps:
            self._free.put(self._slab)
            self._slab = None

    def state(self) -> StreamState:
        """Return where the stream stands: after the steps that were completed by ``advance``."""
        return replace(self._opened, consumed_rows=self._consumed, **self._order.record(self._consumed))

    @property
    def consumed_tokens(self) -> int:
        """Tokens trained on so far."""
        return self._consumed * self._rows.seq_len

    def epochs(self) -> dict[str, Any]:
        """Return ``epoch``, and ``source_epoch`` where there are several sources: passes so far, with the fraction under way."""
        return self._order.epochs(self._consumed)

    def close(self) -> None:
        """Return with the reader thread ended. The stream can no longer be taken from."""
        if self._error is None:
            self._error = RuntimeError("the stream is closed")
        self._free.put(None)
        self._reader.join()

    def _read_ahead(self, start: int) -> None:
        """Fill free slabs from position ``start`` on until told to stop; what goes wrong is handed over like a slab."""
        try:
            plan = self._plan(start)
            while (slab := self._free.get()) is not None and self._error is None:  # until close()
                slab.fill(self._rows, *next(plan))
                self._full.put(slab)
        except BaseException as error:  # it belongs to the thread that trains
            self._full.put(error)

    def _plan(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield positions, shards and rows of one slab after the other, from ``start`` on. Many steps are placed at once."""
        steps = 1
        while True:
            positions = self._order.steps(start, count=steps, global_batch=self._global_batch, rank=self._rank,
                                          world_size=self._world_size).ravel()
            places = self._order.locate(positions)
            for first in range(0, len(positions), self._slab_rows):
                part = slice(first, first + self._slab_rows)
                yield positions[part], places.shard[part], places.row[part]
            start += steps * self._global_batch
            steps = min(2 * steps, self._plan_steps)


class EvaluationRows:
    """The same ``count`` rows at every evaluation, spread evenly over the data: whole micro-batches, equally many on each rank.

    The last micro-batches are filled up with rows of ``valid_B`` False. Rows are read again at each pass, into the same memory.
    """

    def __init__(self, rows: TokenRows, *, count: int, micro_batch: int, rank: int, world_size: int, with_documents: bool = False) -> None:
        self._rows, self._micro_batch, self._rank, self._world_size = rows, micro_batch, rank, world_size
        self._ends = np.cumsum(rows.shard_rows)
        self.available = int(self._ends[-1])
        self.count = min(count, self.available)
        self._slab = _Slab(1, micro_batch, micro_batch, length=rows.seq_len + 1, with_documents=with_documents, pin_memory=False)

    def __len__(self) -> int:
        """The number of micro-batches of each rank."""
        return -(-self.count // (self._world_size * self._micro_batch))

    def __iter__(self) -> Iterator[Rows]:
        """Yield this rank's micro-batches, each good until the next."""
        for turn in range(len(self)):
            first = (turn * self._world_size + self._rank) * self._micro_batch
            position = np.arange(first, first + self._micro_batch)
            line = np.minimum(position, self.count - 1) * self.available // self.count
            shard = np.searchsorted(self._ends, line, side="right")
            self._slab.fill(self._rows, position, shard, line - self._ends[shard] + self._rows.shard_rows[shard])
            [[batch]] = self._slab.batches
            yield replace(batch, valid_B=batch.valid_B & (batch.position < self.count))


class _Slab:
    """Memory for this rank's rows of a few steps, and the micro-batches that are views of it, made once."""

    def __init__(self, steps: int, step_rows: int, micro_batch: int, *, length: int, with_documents: bool, pin_memory: bool) -> None:
        n = steps * step_rows
        ids = torch.empty((n, length), dtype=torch.int64, pin_memory=pin_memory)
        documents = torch.empty((n, length), dtype=torch.int32, pin_memory=pin_memory) if with_documents else None
        position, valid, source = torch.empty(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int16)
        cuts = [slice(first, first + micro_batch) for first in range(0, n, micro_batch)]
        batches = [Rows(ids[cut], None if documents is None else documents[cut], valid[cut], source[cut], position[cut]) for cut in cuts]
        per_step = step_rows // micro_batch
        self.batches = [batches[first:first + per_step] for first in range(0, len(batches), per_step)]  # of each step
        self.steps, self._step_rows = 0, step_rows  # how many are filled; rows of each
        self._ids, self._position, self._source, self._valid = ids.numpy(), position.numpy(), source.numpy(), valid.numpy()
        self._documents = None if documents is None else documents.numpy()

    def fill(self, rows: TokenRows, positions: np.ndarray, shards: np.ndarray, numbers: np.ndarray) -> None:
        """Return with row ``numbers[k]`` of shard ``shards[k]`` read, for each k."""
        n = len(positions)
        self.steps = n // self._step_rows
        self._position[:n] = positions
        if len(rows.manifests) > 1:
            self._source[:n] = rows.source_of(shards)
        self._valid[:n] = rows.fill(shards, numbers, self._ids[:n])
        if self._documents is not None:
            rows.fill_document_ids(shards, numbers, self._documents[:n])


def _check_same(ours: StreamState, saved: StreamState) -> None:
    names = {"fingerprint": "data.sources (the shards themselves)", "seed": "run.seed", "seq_len": "data.seq_len", "lanes": "data.lanes",
             "block": "data.block"}
    differ = [f"{where}: {getattr(saved, name)} in the checkpoint, {getattr(ours, name)} now"
              for name, where in names.items() if getattr(ours, name) != getattr(saved, name)]
    if differ:
        raise DataError("the checkpoint continues another stream of data; rows would be repeated or lost", where="; ".join(differ),
                        remedy="give back the data and these values, or start a new run with another run.name")
