"""From positions to micro-batches: a thread of this process prepares the rows of many steps ahead,
``take`` copies those of a few.

    reader thread:   the next rows of the plan (order.steps, order.locate) -> rows.prepare: read,
                     verified, documents found
    training:        take() -> copies a slab of a few steps, views into it;  advance() -> the step
                     is done

All that may wait for a disk, or takes Python's time, is done in the thread, for thousands of rows
at once, while those before are trained on. The first plan is one step, the next two, then four ...:
the first batch comes at once. The copy (1 ms for 2 M tokens) is left to the thread that trains: a
hand-over between threads costs as much, and a small slab stays in this core's cache.

The state is the number of rows consumed. It moves in advance(), never before, so whatever was
prepared ahead is prepared again. Worker processes would cost about 1 ms a batch in hand-over alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from hfscale.dist.world import Place
from hfscale.errors import DataError
from hfscale.monitor.incidents import Place as DataPlace
from hfscale.stream.ahead import fetch_ahead
from hfscale.stream.left_out import LeftOut, Span
from hfscale.stream.mixture import Mixture, Passes
from hfscale.stream.order import Places
from hfscale.stream.prepared import Prepared, RowSource, RunRows
from hfscale.stream.rows import Rows, TokenRows
from hfscale.stream.state import StreamState

SPARSE = 16  # a look further ahead is further from the one before, by the 16th of its distance
SLAB_TOKENS = 2**16  # of a slab (0.5 MiB of ids: it stays in the cache), where a step is not larger
MOST_PLACES = 256  # rows whose documents an incident names
# at most, of all ranks, that are prepared at once: rows share what is found once a shard and chunk
PLAN_ROWS = 2**15


class Stream:
    """This rank's micro-batches of each step, from any state on, on any number of ranks.

    ``global_batch`` must divide by ``place.size * micro_batch``; the reader prepares
    ``prefetch_steps`` ahead, or what PLAN_ROWS and ``rows.plan_tokens`` allow, where that is more.
    ``take`` and ``advance`` belong to one thread.

    Raises:
        DataError: if ``state`` is of other data or of another order; it names what differs.
    """

    def __init__(
        self,
        rows: RunRows,
        order: Mixture,
        *,
        global_batch: int,
        micro_batch: int,
        place: Place,
        state: StreamState | None = None,
        prefetch_steps: int = 2,
        with_documents: bool = False,
        pin_memory: bool = False,
    ) -> None:
        # rules.py has checked it
        assert global_batch % (place.size * micro_batch) == 0, (global_batch, place, micro_batch)
        self._rows, self._order = rows, order
        fresh = StreamState(
            rows.fingerprint, order.seed, rows.seq_len, order.lanes, order.block, order.rows
        )
        # a source may have come to a mixture
        self._opened = replace(state or fresh, epoch_rows=order.rows)
        _check_same(fresh, self._opened)
        self._consumed = self._opened.consumed_rows
        self.ledger = LeftOut(self._opened.left_out)  # the rows that the run leaves out
        self._global_batch, self._place = global_batch, place
        self._share = global_batch // place.size  # rows of this rank in a step
        self._plan_steps = max(
            prefetch_steps, min(PLAN_ROWS, rows.plan_tokens // rows.seq_len) // global_batch
        )
        self._documents_per = micro_batch if with_documents else 0
        slab_steps = max(1, min(self._plan_steps, SLAB_TOKENS // (self._share * rows.seq_len)))
        self._slab = _Slab(
            slab_steps, self._share, micro_batch, length=rows.seq_len + 1, pin_memory=pin_memory
        )
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="stream-reader")
        self._closed = False
        self._begin()
        self._ahead = threading.Thread(
            target=fetch_ahead, args=(rows, self._wanted), daemon=True, name="stream-ahead"
        )
        self._ahead.start()

    def _begin(self) -> None:
        """Have the reader prepare what comes after the rows consumed."""
        # of the slab: the step being trained on, and how many are filled
        self._step = self._steps = 0
        # of the rows that the slab is filled from, and how many of them were
        self._positions = np.empty(0, np.int64)
        self._copied = 0
        self._next = self._reader.submit(self._prepare, self._consumed, 1)

    def take(self) -> list[Rows]:
        """Return this rank's micro-batches of the next step; until ``advance`` the same again.
        Their memory is reused after that.

        Raises:
            DataError: if the data is missing or damaged, or whatever else stopped the reader
                thread.
        """
        if self._closed:
            raise RuntimeError("the stream is closed")
        if self._order.end is not None and self._consumed + self._global_batch > self._order.end:
            raise DataError(
                "every source has given its max_epochs",
                where="data.sources",
                value=f"{self._order.end:,} rows",
            )
        if self._step == self._steps:
            if self._copied == len(self._positions):
                self._positions, self._prepared = self._next.result()
                self._copied, steps = 0, len(self._positions) // self._share
                start = self._consumed + steps * self._global_batch  # of the next
                self._next = self._reader.submit(
                    self._prepare, start, min(2 * steps, self._plan_steps)
                )
            rows = self._slab.fill(self._positions, self._prepared, self._copied)
            self._copied, self._step, self._steps = self._copied + rows, 0, rows // self._share
        return self._slab.steps[self._step]

    def advance(self) -> None:
        """Return with the taken step counted as consumed: its optimizer step is complete."""
        assert self._step < self._steps, "advance() without take()"
        self._consumed += self._global_batch
        self._rows.advance(self._consumed)
        self._step += 1

    def rewind(
        self, content: Mapping[str, object], *, left_out: Iterable[Span], at: int | None = None
    ) -> None:
        """Return with the stream where a checkpoint's ``content`` (``state().to_dict()``) has it,
        or further on at row ``at``, and without the rows that are ``left_out``.
        """
        self.ledger = LeftOut(left_out)
        state = replace(
            StreamState.from_dict(content), left_out=[[*span] for span in self.ledger.spans]
        )
        with suppress(Exception):  # whatever stopped the reader is met again, if it still matters
            self._next.result()
        self._opened = replace(state, epoch_rows=self._order.rows)
        self._consumed = state.consumed_rows if at is None else at
        self._rows.rewind(state)
        self._begin()

    @property
    def step_rows(self) -> Span:
        """The positions of the step that comes next, or is taken."""
        return self._consumed, self._consumed + self._global_batch

    def places(self, rows: Span) -> list[DataPlace]:
        """Return where the rows at these positions lie, at most MOST_PLACES; nothing of raw text,
        of which only a rebuilt step knows it.
        """
        if not isinstance(self._rows, TokenRows):
            return []
        positions = np.arange(rows[0], min(rows[1], rows[0] + MOST_PLACES))
        of_positions = self._order.locate(positions)
        lies = zip(positions.tolist(), of_positions.shard.tolist(), of_positions.row.tolist())
        places = []
        for position, shard, row in lies:
            with suppress(DataError):  # damaged, and skipped
                name, _, _, documents = self._rows.locate(shard, row)
                places.append(DataPlace(position=position, shard=name, documents=documents))
        return places

    def state(self) -> StreamState:
        """Return where the stream stands: after the steps that were completed by ``advance``. All
        ranks call this together.
        """
        return replace(
            self._opened,
            consumed_rows=self._consumed,
            **self._order.record(self._consumed),
            cursors=self._rows.record(),
        )

    def epochs(self) -> Passes:
        """Return ``epoch``, and ``source_epoch`` where there are several sources: passes so far.
        All ranks call this together.
        """
        return self._order.epochs(self._consumed, self._rows.record())

    def close(self) -> None:
        """Return with the reader thread ended. The stream can no longer be taken from."""
        self._rows.close()
        self._reader.shutdown(cancel_futures=True)
        self._ahead.join()
        self._closed = True

    def _prepare(self, start: int, steps: int) -> tuple[np.ndarray, Prepared]:
        """Return the positions of this rank's rows in ``steps`` steps from position ``start`` on,
        and these rows, ready to be copied.
        """
        positions, places = self._places(start, steps)
        return positions, self._rows.prepare(
            places.shard,
            places.row,
            documents_per=self._documents_per,
            positions=positions,
            left_out=self.ledger.mask(positions) if self.ledger else None,
        )

    def _wanted(self) -> Iterator[np.ndarray]:
        """Yield the shards that the next steps want on this rank, then those of steps further and
        further ahead, up to an epoch.
        """
        start, ahead, wanted = self._consumed, 0, self._rows.wanted()
        steps = -(-self._order.lanes // self._global_batch)  # go through all lanes
        while ahead * min(self._global_batch, self._order.lanes) <= self._order.rows:
            _, places = self._places(start + ahead * self._global_batch, steps)
            yield wanted(places.shard, ahead)
            ahead += max(steps, ahead // SPARSE)

    def _places(self, start: int, steps: int) -> tuple[np.ndarray, Places]:
        positions = self._order.steps(
            start,
            count=steps,
            global_batch=self._global_batch,
            place=self._place,
        ).ravel()
        return positions, self._order.locate(positions)


class EvaluationRows:
    """The same ``count`` rows at every evaluation, spread evenly over the data: whole
    micro-batches, equally many on each rank.

    The last micro-batches are filled up with rows of ``valid_B`` False. Rows are read again at each
    pass.
    """

    def __init__(
        self,
        rows: RowSource,
        *,
        count: int,
        micro_batch: int,
        place: Place,
        with_documents: bool = False,
    ) -> None:
        self._rows, self._micro_batch, self._place = rows, micro_batch, place
        self._ends = np.cumsum(rows.shard_rows)
        self.available = int(self._ends[-1])
        self.count = min(count, self.available)
        self._documents_per = micro_batch if with_documents else 0

    def __len__(self) -> int:
        """The number of micro-batches of each rank."""
        return -(-self.count // (self._place.size * self._micro_batch))

    def first(self, count: int) -> Rows:
        """Return at most ``count`` of the rows, spread as they are, and alike on every rank."""
        count = min(count, self.count)
        few = EvaluationRows(
            self._rows,
            count=count,
            micro_batch=count,
            place=Place(),
            with_documents=self._documents_per > 0,
        )
        return next(iter(few))

    def __iter__(self) -> Iterator[Rows]:
        """Yield this rank's micro-batches."""
        for turn in range(len(self)):
            first = (turn * self._place.size + self._place.rank) * self._micro_batch
            position = np.arange(first, first + self._micro_batch)
            line = np.minimum(position, self.count - 1) * self.available // self.count
            shard = np.searchsorted(self._ends, line, side="right")
            numbers = line - self._ends[shard] + self._rows.shard_rows[shard]
            slab = _Slab(
                1,
                self._micro_batch,
                self._micro_batch,
                length=self._rows.seq_len + 1,
                pin_memory=False,
            )
            slab.fill(
                position, self._rows.prepare(shard, numbers, documents_per=self._documents_per), 0
            )
            [[batch]] = slab.steps
            yield replace(batch, valid_B=batch.valid_B & (batch.position < self.count))


class _Slab:
    """Memory for this rank's rows of a few steps, and the micro-batches of each step that are views
    of it, made once.
    """

    def __init__(
        self, steps: int, step_rows: int, micro_batch: int, *, length: int, pin_memory: bool
    ) -> None:
        n, self._micro_batch = steps * step_rows, micro_batch
        ids = torch.empty((n, length), dtype=torch.int64, pin_memory=pin_memory)
        position = torch.empty(n, dtype=torch.int64)
        valid = torch.empty(n, dtype=torch.bool)
        source = torch.empty(n, dtype=torch.int16)
        cuts = [slice(first, first + micro_batch) for first in range(0, n, micro_batch)]
        self._batches = [
            Rows(ids[cut], None, valid[cut], source[cut], position[cut]) for cut in cuts
        ]
        per_step = step_rows // micro_batch
        self.steps = [
            self._batches[first : first + per_step] for first in range(0, len(cuts), per_step)
        ]
        self._ids = ids.numpy()
        self._position = position.numpy()
        self._source = source.numpy()
        self._valid = valid.numpy()

    def fill(self, positions: np.ndarray, rows: Prepared, start: int) -> int:
        """Return how many rows, from ``start`` on, are now in the micro-batches: as many as fit, or
        are left.
        """
        n = min(len(self._ids), len(positions) - start)
        part = slice(start, start + n)
        rows.fill(part, self._ids[:n])
        self._position[:n] = positions[part]
        self._source[:n] = rows.source[part]
        self._valid[:n] = rows.valid[part]
        first = start // self._micro_batch
        for batch, boundaries in zip(
            self._batches, rows.boundaries[first : first + n // self._micro_batch]
        ):
            batch.boundaries = torch.from_numpy(boundaries)
        return n


def _check_same(ours: StreamState, saved: StreamState) -> None:
    names = {
        "fingerprint": "data.sources (the shards themselves)",
        "seed": "run.seed",
        "seq_len": "data.seq_len",
        "lanes": "data.lanes",
        "block": "data.block",
    }
    differ = [
        f"{where}: {getattr(saved, name)} in the checkpoint, {getattr(ours, name)} now"
        for name, where in names.items()
        if getattr(ours, name) != getattr(saved, name)
    ]
    if differ:
        raise DataError(
            "the checkpoint continues another stream of data; rows would be repeated or lost",
            where="; ".join(differ),
            remedy="give back the data and these values, or start a new run with another run.name",
        )
