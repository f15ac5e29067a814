"""The samples of a source of raw text, and one lane of them: laid end to end, tokenized, cut into
rows.

Shape legend: a row is L + 1 tokens; n samples asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hfscale.encoding import Encoders
from hfscale.errors import DataError
from hfscale.shards.raw import Encoded, Sample, encode_samples, samples_of
from hfscale.shards.tars import name_at
from hfscale.stream.mixture import Mixture
from hfscale.stream.order import Places
from hfscale.stream.prepared import FILLER_ID
from hfscale.stream.rows import TokenRows

TYPICAL_BYTES = 2**11  # of a sample, until a lane has seen its own
# a token of the first row: a lane's first task is small, the next twice that, and so on
FIRST_BYTES = 8

Cursor = tuple[int, int]  # a sample, counted in its lane, and how many of its ids are in rows


class Samples:
    """The samples of one source of raw text: which comes when in a lane, and where its text lies.

    ``rows`` are those of all sources, joined; their damage is noted there.
    """

    def __init__(self, rows: TokenRows, order: Mixture, source: int) -> None:
        self._rows, self._lanes = rows, order.lanes
        self._order = order.orders[source]
        self._first_shard = int(rows.first_shards[source])
        self.manifest = rows.manifests[source]

    def shards(self, lanes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the shards (n) of samples, numbered through all sources."""
        return self._first_shard + self._locate(lanes, numbers).shard

    def places(self, lane: int, first: int, count: int) -> list[tuple[int, int]]:
        """Return the shard of each of ``count`` samples of a lane, and its number there."""
        places = self._locate(lane, np.arange(first, first + count))
        return list(zip(places.shard.tolist(), places.row.tolist(), strict=True))

    def _locate(self, lane: int | np.ndarray, numbers: np.ndarray) -> Places:
        in_lane = (self._order.rows - lane - 1) // self._lanes + 1  # samples of an epoch
        epoch, turn = np.divmod(numbers, in_lane)
        return self._order.locate(epoch * self._order.rows + turn * self._lanes + lane)

    def at(self, shard: int, number: int) -> Sample:
        """Return where the text of a sample lies: at -1, where its shard cannot be had and is to be
        skipped.
        """
        entry, whole = self.manifest.shards[shard], (self._first_shard + shard, -1)
        path = self.manifest.folder / entry.name
        try:
            if whole in self._rows.damage:
                raise self._rows.damage[whole]
            with self.manifest.local(entry):
                samples = samples_of(self.manifest.folder, entry)
        except DataError as error:
            if not self._rows.skip:
                raise
            self._rows.note(*whole, error)
            return path, -1, 0, 0
        offset, size, _, _, checksum = samples[number].item()
        return path, offset, size, checksum

    def error(self, lane: int, number: int, problem: str) -> DataError:
        """Return the error that names a damaged sample, which was noted if it is to be skipped."""
        [(shard, in_shard)] = self.places(lane, number, 1)
        path, offset, *_ = self.at(shard, in_shard)
        whole = self._first_shard + shard
        if (whole, -1) in self._rows.damage:
            return self._rows.damage[whole, -1]
        what, chunk = "the shard", -1
        if path.exists():
            member, chunk = name_at(path, offset), in_shard
            what = f"sample {in_shard:,} (member {member} at offset {offset:,}): the text"
        error = DataError(
            f"{what} {problem}",
            where=path,
            remedy="restore the tar from a copy; `hfscale shards verify` lists all damage",
        )
        self._rows.note(whole, chunk, error)
        return error

    def locate(self, lane: int, piece: Piece) -> tuple[str, int, str, tuple[int, int]]:
        """Return where a row begins (tar, token of its sample, member) and the numbers of its
        samples.
        """
        first, offset = piece.begin
        last, of_last = piece.after
        count = last - first + (of_last > 0)  # the last token is only predicted
        between = self.places(lane, first, count)
        path, place, *_ = self.at(*between[0])
        return path.name, offset, name_at(path, place), (between[0][1], between[-1][1])


@dataclass(frozen=True)
class Tokenizing:
    """How lanes have their samples tokenized."""

    encoders: Encoders
    seq_len: int
    verify: bool
    tasks: int  # of each lane that are under way at once
    task_bytes: int  # of text, at most, in one of them

    def submit(self, samples: list[Sample], field: str) -> Callable[[], Encoded]:
        """Return what waits for the ids of ``samples``; those of a damaged one fill a row."""
        filler = np.full(self.seq_len, FILLER_ID, "<u4")
        return self.encoders.submit(encode_samples, samples, field, self.verify, filler)


class Piece(NamedTuple):
    """A row, and where it lies."""

    ids: np.ndarray  # (L + 1)
    begin: Cursor  # of its first token
    after: Cursor  # of its last token: rows overlap by one
    documents: np.ndarray  # where in the row they begin
    damage: tuple[int, str] | None  # a damaged sample that it touches, and what is wrong with it


class Lane:
    """One lane of one source: its samples' ids end to end, from a cursor on."""

    def __init__(
        self, samples: Samples, how: Tokenizing, *, source: int, number: int, cursor: Cursor
    ) -> None:
        self.source, self.number = source, number
        self._samples, self._how = samples, how
        # the sample that `_ids` begins with; the next row's place in `_ids`
        self.first, self._at = cursor
        self._ids = np.empty(0, "<u4")
        self._ends = np.empty(0, np.int64)  # of the samples, in `_ids`
        self._damage: dict[int, str] = {}
        self._asked = self.first  # the first sample that is in no task yet
        self._size = FIRST_BYTES * how.seq_len  # of the next task, in bytes of text
        self._mean_size = TYPICAL_BYTES
        self._tasks: deque[Callable[[], Encoded]] = deque()
        self._pulls = 0

    def ask(self) -> None:
        """Return with as many tasks under way as there should be, each of whole samples that come
        to about ``_size`` bytes of text.
        """
        while len(self._tasks) < min(self._how.tasks, 1 + self._pulls):
            samples, size = list[Sample](), 0
            expected = -(-self._size // self._mean_size)
            for place in self._samples.places(self.number, self._asked, expected):
                samples.append(self._samples.at(*place))
                size += samples[-1][2]
                if size >= self._size:
                    break
            self._tasks.append(self._encode(samples))
            self._asked += len(samples)
            self._mean_size = max(TYPICAL_BYTES // 16, size // len(samples))
            self._size = max(self._size, min(2 * self._size, self._how.task_bytes))

    def _encode(self, samples: list[Sample]) -> Callable[[], Encoded]:
        return self._how.submit(samples, self._samples.manifest.text_field)

    def take(self) -> Piece:
        """Return the next row."""
        seq_len = self._how.seq_len
        while len(self._ids) - self._at <= seq_len:
            self._pull()
        start, stop = self._at, self._at + seq_len
        first, last = np.searchsorted(self._ends, (start, stop), side="right").tolist()
        touched = range(self.first + first, self.first + last + 1)
        self._at = stop
        return Piece(
            ids=self._ids[start : stop + 1],
            begin=self._cursor(first, start),
            after=self._cursor(last, stop),
            documents=self._ends[first:last] - start,
            damage=next((one for one in self._damage.items() if one[0] in touched), None),
        )

    def _cursor(self, held: int, at: int) -> Cursor:
        """Return the cursor of place ``at`` of ``_ids``, which is in sample ``held`` of those."""
        before = int(self._ends[held - 1]) if held else 0
        return self.first + held, at - before

    def _pull(self) -> None:
        """Return with the next task's ids behind those that are left; samples that are used up make
        room.
        """
        self.ask()
        ids, ends, damage = self._tasks.popleft()()
        self._pulls += 1
        first = self.first + len(self._ends)
        if damage and self._samples.manifest.remote:
            # the cache may have removed a tar that was not read yet
            places = self._samples.places(self.number, first, len(ends))
            ids, ends, damage = self._encode([self._samples.at(*place) for place in places])()
        used = int(np.searchsorted(self._ends, self._at, side="right"))
        cut = int(self._ends[used - 1]) if used else 0
        self._ends = np.concatenate([self._ends[used:] - cut, ends + (len(self._ids) - cut)])
        self._ids = np.concatenate([self._ids[cut:], ids])
        self.first += used
        self._at -= cut
        self._damage = {n: problem for n, problem in self._damage.items() if n >= self.first}
        self._damage |= {first + number: problem for number, problem in damage.items()}
        self.ask()
