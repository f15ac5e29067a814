"""Rows of raw text, tokenized on the fly. How many rows there are is not known, so every lane has a
cursor of its own.

Position P of the run lies in lane P % C. The samples of a source are put in order as rows are
(``order.py``, with C lanes); a lane's samples, laid end to end, are cut into the rows that the
source has on the positions of that lane. Worked example: 10 samples, C = 4, L = 4. Lane 1 holds
samples 1, 5 and 9 of each epoch's order. Say they have 3, 9 and 2 ids, end-of-document id included:
the first row is ids [0, 5) of them, the second [4, 9), after which the cursor is (sample 1 of the
lane, 5 of its ids), the third [8, 13), and the fourth takes two from the lane's sample 3: number 10
+ 1 in the order, which belongs to the next epoch.

A cursor a lane is the whole state, and C divides the global batch, so it does not matter how lanes
are dealt to ranks. A slice that ends within a lane makes two ranks walk that lane: each its own
rows, the other's are passed over. Each lane has tasks under way in the tokenizing processes beyond
the ids that it holds, small ones at first.

Shape legend: n rows asked for, of L + 1 tokens; C lanes; R sources of raw text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from hfscale.dist.agree import sum_over_ranks
from hfscale.dist.world import Place, available_cores
from hfscale.encoding import Encoders
from hfscale.errors import DataError
from hfscale.shards.raw import Encoded, Sample, encode_samples, samples_of
from hfscale.shards.tars import name_at
from hfscale.stream.mixture import Mixture
from hfscale.stream.order import Order, Places
from hfscale.stream.rows import FILLER_ID, Prepared, TokenRows
from hfscale.tokenizer import end_of_document_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hfscale.config.schema import RunConfig
    from hfscale.stream.state import StreamState

TASK_BYTES = 2**14, 2**18  # of text that a process takes at once, least and most
TYPICAL_BYTES = 2**11  # of a sample, until a lane has seen its own
# of text that all lanes of a rank should hold and have asked for: what a start must tokenize beside
# its rows
AHEAD_BYTES = 2**23
FIRST_BYTES = (
    8  # a token of the first row: a lane's first task is small, the next twice that, and so on
)


def open_encoders(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    local_ranks: int = 1,
    forged: bool = False,
) -> Encoders:
    """Return the tokenizing processes of one of the ranks of this node; ``forged`` for a stream
    that began with it (``state.py``).
    """
    procs = (
        max(1, available_cores() // local_ranks - 1)
        if config.data.tokenize_procs == "auto"
        else config.data.tokenize_procs
    )
    return Encoders(
        tokenizer.backend_tokenizer.to_str(),
        eod_id=end_of_document_id(tokenizer),
        dtype="<u4",
        procs=procs,
        setting="data.tokenize_procs",
        forged=forged,
    )


class Piece(NamedTuple):
    """A row, and where it lies: its first token's sample (counted in the lane) and place in that,
    the cursor after it.
    """

    ids: np.ndarray  # (L + 1)
    sample: int
    offset: int
    after: tuple[int, int]  # of the row's last token: rows overlap by one
    begins: np.ndarray  # where in the row documents begin
    damage: tuple[int, str] | None  # a damaged sample that it touches, and what is wrong with it


class Lane:
    """One lane of one source: its samples' ids end to end, from a cursor (sample, ids of it that
    are in rows) on.
    """

    def __init__(self, rows: TextRows, source: int, number: int) -> None:
        self.source, self.number, self._rows = source, number, rows
        self._manifest = rows.manifests[source]
        cursor: list[int] = rows.cursors[rows.order.raw.index(source), number].tolist()
        self.first, self._at = (
            cursor  # the sample that `_ids` begins with; the next row's place in `_ids`
        )
        self._ids, self._ends, self._damage = (
            np.empty(0, "<u4"),
            np.empty(0, np.int64),
            dict[int, str](),
        )
        self._asked, self._size, self._mean_size = (
            self.first,
            FIRST_BYTES * rows.seq_len,
            TYPICAL_BYTES,
        )
        self._tasks: deque[Callable[[], Encoded]] = deque()
        self._pulls = 0

    def places(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return the shard of each of ``count`` samples from ``first`` on, and its number there."""
        found = self._rows.samples(self.source, self.number, np.arange(first, first + count))
        return list(zip(found.shard.tolist(), found.row.tolist(), strict=True))

    def ask(self) -> None:
        """Return with as many tasks under way as there should be, each of whole samples that come
        to about ``_size`` bytes of text.
        """
        while len(self._tasks) < min(self._rows.ahead, 1 + self._pulls):
            samples, size = list[Sample](), 0
            for place in self.places(self._asked, -(-self._size // self._mean_size)):
                samples.append(self._rows.sample(self.source, *place))
                if (size := size + samples[-1][2]) >= self._size:
                    break
            self._tasks.append(self._encode(samples))
            self._asked, self._mean_size = (
                self._asked + len(samples),
                max(TYPICAL_BYTES // 16, size // len(samples)),
            )
            self._size = max(self._size, min(2 * self._size, self._rows.task_bytes))

    def _encode(self, samples: list[Sample]) -> Callable[[], Encoded]:
        return self._rows.encoders.submit(
            encode_samples, samples, self._manifest.source["field"], *self._rows.options
        )

    def take(self) -> Piece:
        """Return the next row."""
        while len(self._ids) - self._at <= self._rows.seq_len:
            self._pull()
        start, stop, ends = self._at, self._at + self._rows.seq_len, self._ends
        a, b = np.searchsorted(ends, (start, stop), side="right").tolist()
        cursors = [
            (self.first + n, at - (int(ends[n - 1]) if n else 0))
            for n, at in ((a, start), (b, stop))
        ]
        damage = next(
            (found for found in self._damage.items() if a <= found[0] - self.first <= b), None
        )
        self._at = stop
        return Piece(
            self._ids[start : stop + 1], *cursors[0], cursors[1], ends[a:b] - start, damage
        )

    def _pull(self) -> None:
        """Return with the next task's ids behind those that are left; samples that are used up make
        room.
        """
        self.ask()
        ids, ends, damage = self._tasks.popleft()()
        self._pulls += 1
        first = self.first + len(self._ends)
        if (
            damage and self._manifest.remote
        ):  # the cache may have removed a tar that was not read yet
            ids, ends, damage = self._encode(
                [self._rows.sample(self.source, *place) for place in self.places(first, len(ends))]
            )()
        used = int(np.searchsorted(self._ends, self._at, side="right"))
        cut = int(self._ends[used - 1]) if used else 0
        self._ends = np.concatenate([self._ends[used:] - cut, ends + (len(self._ids) - cut)])
        self._ids = np.concatenate([self._ids[cut:], ids])
        self.first, self._at = self.first + used, self._at - cut
        self._damage = {
            number: problem for number, problem in self._damage.items() if number >= self.first
        }
        self._damage |= {first + number: problem for number, problem in damage.items()}
        self.ask()


class TextRows(TokenRows):
    """The rows of a mixture in which some sources are raw text: ``prepare`` gives the rows of a
    rank, step after step, and no others.

    ``rows`` are those of all sources, joined; ``state`` is where the stream begins. ``encoders``
    are closed with it.
    """

    plan_tokens = 2**20  # tokenizing takes longer than reading

    def __init__(
        self,
        rows: TokenRows,
        order: Mixture,
        encoders: Encoders,
        *,
        global_batch: int,
        place: Place = Place(),
        state: StreamState | None = None,
    ) -> None:
        vars(self).update(vars(rows))
        self.order, self.encoders, lanes = order, encoders, order.lanes
        self.options = (self.verify, np.full(self.seq_len, FILLER_ID, "<u4"))
        share = global_batch // place.size  # rows of a rank in a step
        each = global_batch // lanes  # rows of a lane in a step
        first = place.rank * share
        ends = (np.arange(lanes) + 1) * each  # of each lane's rows in a step that is sorted by lane
        # lanes whose last row is this rank's: their cursors are right here
        self._owned = (ends - 1) // share == place.rank
        own_lanes = int(((ends > first) & (ends - each < first + share)).sum())
        width = len(order.raw) * own_lanes
        self.ahead = max(4, -(-2 * encoders.procs // width))  # tasks of each lane
        self.task_bytes = max(
            TASK_BYTES[0], min(TASK_BYTES[1], AHEAD_BYTES // width // (1 + self.ahead))
        )
        self.cursors = np.zeros((len(order.raw), lanes, 2), np.int64)
        if (
            state is not None and state.cursors and state.lanes == lanes
        ):  # other lanes are refused by `Stream`
            self.cursors[: len(state.cursors)] = state.cursors
        start = state.consumed_rows if state is not None else 0
        self._next = (
            start + (np.arange(lanes) - start) % lanes
        )  # the first position of each lane that was not walked yet
        self._lanes: dict[tuple[int, int], Lane] = {}
        self._walked: deque[tuple[int, Lane, tuple[int, int]]] = (
            deque()
        )  # position, and the lane's cursor after it
        self.pieces: dict[
            int, tuple[Lane, Piece]
        ] = {}  # of the rows of raw text that were prepared last

    def prepare(
        self,
        shards: np.ndarray,
        rows: np.ndarray,
        *,
        documents_per: int = 0,
        positions: np.ndarray | None = None,
    ) -> Prepared:
        """Return the rows (n) of a rank at ``positions`` of the run, ready to be copied.

        Raises:
            DataError: if a tokenizing process was killed, or an index is missing. Damage stops the
                first row that needs it.
        """
        assert positions is not None
        n, L, wanted = (
            len(positions),
            self.seq_len,
            {position: k for k, position in enumerate(positions.tolist())},
        )
        ids, valid, blocked = (
            np.full((n, L + 1), FILLER_ID, "<u4"),
            np.ones(n, dtype=bool),
            dict[int, DataError](),
        )
        begins = [np.empty(0, np.int64)] * n  # documents in each row
        if (tokens := np.flatnonzero(~np.isin(self.source_of(shards), self.order.raw))).size:
            prepared = super().prepare(
                shards[tokens], rows[tokens], documents_per=min(1, documents_per)
            )
            blocked, prepared.blocked = (
                {int(tokens[k]): error for k, error in prepared.blocked.items()},
                {},
            )
            read = np.empty((len(tokens), L + 1), "<u4")
            prepared.fill(slice(0, len(tokens)), read)
            ids[tokens], valid[tokens] = read, prepared.valid
            for k, boundaries in zip(tokens.tolist(), prepared.boundaries):
                begins[k] = boundaries + 1
        walk = self._walk(positions)
        for lane in dict.fromkeys(lane for _, lane in walk):
            lane.ask()
        self.pieces = {}
        for position, lane in walk:
            k = wanted.get(position)
            piece = lane.take()
            self._walked.append((position, lane, piece.after))
            if k is None:
                continue
            self.pieces[k] = lane, piece
            if piece.damage is None:
                ids[k], begins[k] = piece.ids, piece.begins
            else:
                error = self._damage(lane, *piece.damage)
                valid[k], blocked = False, blocked if self._skip else {**blocked, k: error}
        return Prepared.copied(
            ids, begins, documents_per, valid=valid, source=self.source_of(shards), blocked=blocked
        )

    def samples(self, source: int, lane: int | np.ndarray, numbers: np.ndarray) -> Places:
        """Return the places of a source's samples (n), counted in their lanes."""
        order, lanes = self.order.orders[source], self.order.lanes
        epoch, i = np.divmod(numbers, (order.rows - lane - 1) // lanes + 1)
        return order.locate(epoch * order.rows + i * lanes + lane)

    def sample(self, source: int, shard: int, number: int) -> Sample:
        """Return where the text of a sample lies: at -1, where its shard cannot be had and is to be
        skipped.
        """
        manifest, whole = self.manifests[source], int(self._first_shards[source]) + shard
        entry = manifest.shards[shard]
        try:
            if (whole, -1) in self.damage:
                raise self.damage[whole, -1]
            with manifest.local(entry):
                offset, size, _, _, checksum = samples_of(manifest.folder, entry)[number].item()
        except DataError as error:
            if not self._skip:
                raise
            self._note(whole, -1, error)
            offset, size, checksum = -1, 0, 0
        return manifest.folder / entry.name, offset, size, checksum

    def wanted(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """Return what tells which shards are wanted, given those of rows, so many steps ahead: as
        if a step took a sample of each lane.
        """
        held = np.array(
            [(lane.source, lane.number, lane.first) for lane in [*self._lanes.values()]], np.int64
        ).reshape(-1, 3)

        def wanted(shards: np.ndarray, ahead: int) -> np.ndarray:
            found = [shards[~np.isin(self.source_of(shards), self.order.raw)]]
            for source in set(held[:, 0].tolist()):
                _, lane, first = held[held[:, 0] == source].T
                found.append(
                    self._first_shards[source] + self.samples(source, lane, first + ahead).shard
                )
            return np.concatenate(found)

        return wanted

    def advance(self, consumed: int) -> None:
        """Return with the cursors after ``consumed`` rows of the run."""
        while self._walked and self._walked[0][0] < consumed:
            _, lane, cursor = self._walked.popleft()
            self.cursors[self.order.raw.index(lane.source), lane.number] = cursor

    def record(self) -> dict[str, Any]:
        """Return the cursors (R, C, 2) for the state of the stream, gathered from all ranks: they
        call this together.
        """
        return {
            "cursors": sum_over_ranks(torch.from_numpy(self.cursors * self._owned[:, None]))
            .long()
            .tolist()
        }

    def close(self) -> None:
        """Return with the tokenizing processes told to end."""
        super().close()
        self.encoders.close()

    def locate(self, k: int) -> tuple[str, int, str, tuple[int, int]]:
        """Return where row ``k`` of those prepared last begins (tar, token of its sample, member)
        and the numbers of its samples.
        """
        lane, piece = self.pieces[k]
        between = lane.places(
            piece.sample, piece.after[0] - piece.sample + (piece.after[1] > 0)
        )  # the last token is only predicted
        path, offset, *_ = self.sample(lane.source, *between[0])
        return path.name, piece.offset, name_at(path, offset), (between[0][1], between[-1][1])

    def _walk(self, positions: np.ndarray) -> list[tuple[int, Lane]]:
        """Return position and lane of the rows of raw text, up to each of ``positions`` (n) in its
        lane, that were not walked before.
        """
        lanes, last = self.order.lanes, np.full(self.order.lanes, -1)
        np.maximum.at(last, positions % lanes, positions)
        line = np.arange(self._next[positions % lanes].min(), positions.max() + 1)
        line = line[(self._next[line % lanes] <= line) & (line <= last[line % lanes])]
        self._next = np.where(last < 0, self._next, last + lanes)
        source, _ = self.order.place(line)
        walk = zip(line.tolist(), source.tolist(), strict=True)
        keys = [
            (position, (number, position % lanes))
            for position, number in walk
            if number in self.order.raw
        ]
        self._lanes |= {
            key: Lane(self, *key) for key in {key for _, key in keys} - self._lanes.keys()
        }
        return [(position, self._lanes[key]) for position, key in keys]

    def _damage(self, lane: Lane, sample: int, problem: str) -> DataError:
        """Return the error that names a damaged sample, which was noted if it is to be skipped."""
        [(shard, number)] = lane.places(sample, 1)
        path, offset, *_ = self.sample(lane.source, shard, number)
        whole = int(self._first_shards[lane.source]) + shard
        if (whole, -1) in self.damage:
            return self.damage[whole, -1]
        place = (
            f"sample {number:,} (member {name_at(path, offset)} at offset {offset:,}): the text"
            if path.exists()
            else "the shard"
        )
        error = DataError(
            f"{place} {problem}",
            where=path,
            remedy="restore the tar from a copy; `hfscale shards verify` lists all damage",
        )
        self._note(whole, number if path.exists() else -1, error)
        return error


class HeldOutText(TokenRows):
    """The first ``count`` rows of a corpus of raw text, its samples permuted as a whole: tokenized
    once, kept in memory.
    """

    def __init__(self, rows: TokenRows, encoders: Encoders, *, count: int) -> None:
        vars(self).update(vars(rows))
        samples = int(rows.shard_rows.sum())
        order = Mixture(
            [Order(rows.shard_rows, seed=0, lanes=1, block=samples)],
            fingerprints={"text": rows.fingerprint},
            raw=[0],
        )
        text, zeros = TextRows(rows, order, encoders, global_batch=count), np.zeros(count, np.int64)
        self._ids = np.empty((count, rows.seq_len + 1), "<u4")
        prepared = text.prepare(zeros, zeros, positions=np.arange(count))
        prepared.fill(slice(0, count), self._ids)
        text.close()
        self._valid, self._begins = (
            prepared.valid,
            [piece.begins for _, piece in text.pieces.values()],
        )
        self.shard_rows = np.array(
            [sum(piece.after[0] < samples for _, piece in text.pieces.values())]
        )  # what follows is a second epoch
        if not self.shard_rows[0]:
            raise DataError(
                "there is not text enough for a row",
                where=self.manifest.folder,
                remedy="give more, or a smaller data.seq_len",
            )

    def prepare(
        self,
        shards: np.ndarray,
        rows: np.ndarray,
        *,
        documents_per: int = 0,
        positions: np.ndarray | None = None,
    ) -> Prepared:
        """Return ``rows`` (n), ready to be copied."""
        begins = [self._begins[row] for row in rows.tolist()]
        return Prepared.copied(
            self._ids[rows],
            begins,
            documents_per,
            valid=self._valid[rows],
            source=np.zeros_like(rows),
            blocked={},
        )
