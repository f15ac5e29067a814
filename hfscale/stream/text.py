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
from typing import TYPE_CHECKING

import numpy as np
import torch

from hfscale.dist.agree import sum_over_ranks
from hfscale.dist.world import Place, available_cores
from hfscale.encoding import Encoders
from hfscale.errors import DataError
from hfscale.stream.lane import Cursor, Lane, Piece, Samples, Tokenizing
from hfscale.stream.mixture import Mixture
from hfscale.stream.order import Order
from hfscale.stream.prepared import FILLER_ID, Prepared
from hfscale.stream.rows import TokenRows
from hfscale.stream.state import Cursors
from hfscale.tokenizer import end_of_document_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hfscale.config.inference import ShardsConfig
    from hfscale.config.schema import RunConfig
    from hfscale.stream.state import StreamState

TASK_BYTES = 2**14, 2**18  # of text that a process takes at once, least and most
# of text that all lanes of a rank should hold and have asked for: what a start must tokenize beside
# its rows
AHEAD_BYTES = 2**23


def open_encoders(
    config: RunConfig | ShardsConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    local_ranks: int = 1,
    forged: bool = False,
) -> Encoders:
    """Return the tokenizing processes of one of the ranks of this node; ``forged`` for a stream
    that began with it (``state.py``).
    """
    procs = config.data.tokenize_procs
    share_of_cores = max(1, available_cores() // local_ranks - 1)
    return Encoders(
        tokenizer.backend_tokenizer.to_str(),
        eod_id=end_of_document_id(tokenizer),
        dtype="<u4",
        procs=share_of_cores if procs == "auto" else procs,
        setting="data.tokenize_procs",
        forged=forged,
    )


class TextRows:
    """The rows of a mixture in which some sources are raw text: ``prepare`` gives the rows of a
    rank, step after step, and no others.

    ``tokens`` are the rows of all sources, joined; ``state`` is where the stream begins.
    ``encoders`` are closed with it.
    """

    plan_tokens = 2**20  # tokenizing takes longer than reading

    def __init__(
        self,
        tokens: TokenRows,
        order: Mixture,
        encoders: Encoders,
        *,
        global_batch: int,
        place: Place = Place(),
        state: StreamState | None = None,
    ) -> None:
        self._tokens, self._order, self._encoders = tokens, order, encoders
        self.seq_len, self.shard_rows = tokens.seq_len, tokens.shard_rows
        self.manifests, self.fingerprint = tokens.manifests, tokens.fingerprint
        lanes = order.lanes
        share = global_batch // place.size  # rows of a rank in a step
        each = global_batch // lanes  # rows of a lane in a step
        first = place.rank * share
        ends = (np.arange(lanes) + 1) * each  # of each lane's rows in a step that is sorted by lane
        # lanes whose last row is this rank's: their cursors are right here
        self._owned = (ends - 1) // share == place.rank
        own_lanes = int(((ends > first) & (ends - each < first + share)).sum())
        width = len(order.raw) * own_lanes
        tasks = max(4, -(-2 * encoders.procs // width))
        least, most = TASK_BYTES
        self._how = Tokenizing(
            encoders,
            tokens.seq_len,
            tokens.verify,
            tasks=tasks,
            task_bytes=max(least, min(most, AHEAD_BYTES // width // (1 + tasks))),
        )
        self._samples = {source: Samples(tokens, order, source) for source in order.raw}
        self._begin(state)

    def _begin(self, state: StreamState | None) -> None:
        """Stand at ``state``, with no lane open."""
        order, lanes = self._order, self._order.lanes
        self.cursors = np.zeros((len(order.raw), lanes, 2), np.int64)
        start = state.consumed_rows if state else 0
        if state and state.cursors and state.lanes == lanes:  # other lanes are refused by `Stream`
            self.cursors[: len(state.cursors)] = state.cursors
        # the first position of each lane that was not walked yet
        self._next = start + (np.arange(lanes) - start) % lanes
        self._lanes: dict[tuple[int, int], Lane] = {}  # by source and number
        # position, and the lane's cursor after it
        self._walked: deque[tuple[int, Lane, Cursor]] = deque()
        # of the rows of raw text that were prepared last
        self.pieces: dict[int, tuple[Lane, Piece]] = {}

    def prepare(
        self,
        shards: np.ndarray,
        rows: np.ndarray,
        *,
        documents_per: int = 0,
        positions: np.ndarray | None = None,
        left_out: np.ndarray | None = None,
    ) -> Prepared:
        """Return the rows (n) of a rank at ``positions`` of the run, ready to be copied.

        Raises:
            DataError: if a tokenizing process was killed, or an index is missing. Damage stops the
                first row that needs it.
        """
        assert positions is not None
        n, length = len(positions), self.seq_len + 1
        ids_BL = np.full((n, length), FILLER_ID, "<u4")
        valid = np.ones(n, dtype=bool)
        documents = [np.empty(0, np.int64)] * n  # where they begin in each row
        blocked = dict[int, DataError]()
        source = self._tokens.source_of(shards)
        of_tokens = np.flatnonzero(~np.isin(source, self._order.raw))
        if of_tokens.size:
            prepared = self._tokens.prepare(
                shards[of_tokens],
                rows[of_tokens],
                documents_per=min(1, documents_per),
                left_out=None if left_out is None else left_out[of_tokens],
            )
            blocked = {int(of_tokens[k]): error for k, error in prepared.blocked.items()}
            prepared.blocked = {}
            read = np.empty((len(of_tokens), length), "<u4")
            prepared.fill(slice(0, len(of_tokens)), read)
            ids_BL[of_tokens], valid[of_tokens] = read, prepared.valid
            for k, boundaries in zip(of_tokens.tolist(), prepared.boundaries):
                documents[k] = boundaries + 1
        self.pieces = self._pieces(positions)
        for k, (lane, piece) in self.pieces.items():
            if left_out is not None and left_out[k]:
                valid[k] = False  # its lane goes on all the same
                continue
            if piece.damage is None:
                ids_BL[k], documents[k] = piece.ids, piece.documents
                continue
            valid[k] = False
            error = self._samples[lane.source].error(lane.number, *piece.damage)
            if not self._tokens.skip:
                blocked[k] = error
        return Prepared.copied(
            ids_BL, documents, documents_per, valid=valid, source=source, blocked=blocked
        )

    def wanted(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """Return what tells which shards are wanted, given those of rows, so many steps ahead: as
        if a step took a sample of each lane.
        """
        lanes = [*self._lanes.values()]
        held = np.array([(lane.source, lane.number, lane.first) for lane in lanes], np.int64)
        held = held.reshape(-1, 3)

        def wanted(shards: np.ndarray, ahead: int) -> np.ndarray:
            of_tokens = ~np.isin(self._tokens.source_of(shards), self._order.raw)
            parts = [shards[of_tokens]]
            for source in set(held[:, 0].tolist()):
                _, numbers, first = held[held[:, 0] == source].T
                parts.append(self._samples[source].shards(numbers, first + ahead))
            return np.concatenate(parts)

        return wanted

    def advance(self, consumed: int) -> None:
        """Return with the cursors after ``consumed`` rows of the run."""
        while self._walked and self._walked[0][0] < consumed:
            _, lane, cursor = self._walked.popleft()
            self.cursors[self._order.raw.index(lane.source), lane.number] = cursor

    def rewind(self, state: StreamState) -> None:
        """Return with every lane at the cursor that ``state`` has of it."""
        self._begin(state)

    def record(self) -> Cursors:
        """Return the cursors (R, C, 2) for the state of the stream, gathered from all ranks: they
        call this together.
        """
        own = torch.from_numpy(self.cursors * self._owned[:, None])
        cursors: Cursors = sum_over_ranks(own).long().tolist()
        return cursors

    def close(self) -> None:
        """Return with the tokenizing processes told to end."""
        self._tokens.close()
        self._encoders.close()

    def locate(self, k: int) -> tuple[str, int, str, tuple[int, int]]:
        """Return where row ``k`` of those prepared last begins (tar, token of its sample, member)
        and the numbers of its samples.
        """
        lane, piece = self.pieces[k]
        return self._samples[lane.source].locate(lane.number, piece)

    def _pieces(self, positions: np.ndarray) -> dict[int, tuple[Lane, Piece]]:
        """Return the rows of raw text at ``positions`` (n), by their place there; other ranks' rows
        of their lanes are passed over.
        """
        wanted = {position: k for k, position in enumerate(positions.tolist())}
        walk = self._walk(positions)
        for lane in dict.fromkeys(lane for _, lane in walk):
            lane.ask()
        pieces = {}
        for position, lane in walk:
            piece = lane.take()
            self._walked.append((position, lane, piece.after))
            if position in wanted:
                pieces[wanted[position]] = lane, piece
        return pieces

    def _walk(self, positions: np.ndarray) -> list[tuple[int, Lane]]:
        """Return position and lane of the rows of raw text, up to each of ``positions`` (n) in its
        lane, that were not walked before.
        """
        lanes, last = self._order.lanes, np.full(self._order.lanes, -1)
        np.maximum.at(last, positions % lanes, positions)
        line = np.arange(self._next[positions % lanes].min(), positions.max() + 1)
        line = line[(self._next[line % lanes] <= line) & (line <= last[line % lanes])]
        self._next = np.where(last < 0, self._next, last + lanes)
        source, _ = self._order.place(line)
        return [
            (position, self._lane(number, position % lanes))
            for position, number in zip(line.tolist(), source.tolist(), strict=True)
            if number in self._order.raw
        ]

    def _lane(self, source: int, number: int) -> Lane:
        if (source, number) not in self._lanes:
            sample, ids = self.cursors[self._order.raw.index(source), number].tolist()
            self._lanes[source, number] = Lane(
                self._samples[source],
                self._how,
                source=source,
                number=number,
                cursor=(sample, ids),
            )
        return self._lanes[source, number]


class HeldOutText:
    """The first ``count`` rows of a corpus of raw text, its samples permuted as a whole: tokenized
    once, kept in memory.
    """

    def __init__(self, tokens: TokenRows, encoders: Encoders, *, count: int) -> None:
        self.seq_len = tokens.seq_len
        samples = int(tokens.shard_rows.sum())
        order = Mixture(
            [Order(tokens.shard_rows, seed=0, lanes=1, block=samples)],
            fingerprints={"text": tokens.fingerprint},
            raw=[0],
        )
        text = TextRows(tokens, order, encoders, global_batch=count)
        zeros = np.zeros(count, np.int64)
        self._ids = np.empty((count, tokens.seq_len + 1), "<u4")
        prepared = text.prepare(zeros, zeros, positions=np.arange(count))
        prepared.fill(slice(0, count), self._ids)
        text.close()
        pieces = [piece for _, piece in text.pieces.values()]
        self._valid = prepared.valid
        self._documents = [piece.documents for piece in pieces]
        # what follows is a second epoch
        self.shard_rows = np.array([sum(piece.after[0] < samples for piece in pieces)])
        if not self.shard_rows[0]:
            raise DataError(
                "there is not text enough for a row",
                where=tokens.manifest.folder,
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
        return Prepared.copied(
            self._ids[rows],
            [self._documents[row] for row in rows.tolist()],
            documents_per,
            valid=self._valid[rows],
            source=np.zeros_like(rows),
            blocked={},
        )
