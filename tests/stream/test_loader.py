from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hfscale.dist.world import Place
from hfscale.errors import DataError
from hfscale.stream import loader
from hfscale.stream.digest import batch_digest
from hfscale.stream.loader import EvaluationRows, Stream
from hfscale.stream.rows import TokenRows
from hfscale.stream.state import StreamState
from tests.helpers.orders import order_of

SEQ = 32


def open_stream(
    corpus,
    *,
    place=Place(),
    global_batch=24,
    micro_batch=2,
    state=None,
    seed=3,
    lanes=7,
    block=16,
    seq_len=SEQ,
    **options,
) -> Stream:
    rows = TokenRows(corpus.folder, seq_len=seq_len)
    order = order_of(rows.shard_rows, seed=seed, lanes=lanes, block=block)
    return Stream(
        rows,
        order,
        global_batch=global_batch,
        micro_batch=micro_batch,
        place=place,
        state=state,
        **options,
    )


def train(
    corpus, steps: int, *, world_size=1, state=None, **options
) -> tuple[list[int], list[np.ndarray], StreamState]:
    """Return digest and sorted positions of each step over all ranks, and the state after them, by
    way of JSON.
    """
    streams = [
        open_stream(corpus, place=Place(rank, world_size), state=state, **options)
        for rank in range(world_size)
    ]
    digests, positions = [], []
    for _ in range(steps):
        batches = [rows for stream in streams for rows in stream.take()]
        digests.append(sum(batch_digest([rows.ids_BL[:, :-1]]) for rows in batches) % 2**64)
        positions.append(np.sort(torch.cat([rows.position for rows in batches]).numpy()))
        for stream in streams:
            stream.advance()
    states = {json.dumps(stream.state().to_dict()) for stream in streams}
    for stream in streams:
        stream.close()
    [text] = states  # the same on all ranks
    assert len(text) < 1024
    return digests, positions, StreamState.from_dict(json.loads(text))


def test_any_chain_of_stops_gives_the_uninterrupted_run(make_corpus):
    """Stops and resumes on 1, 2, 4, 3 and 6 ranks with several micro-batches, over two ends of an
    epoch of 900 rows.
    """
    corpus = make_corpus()
    oracle, positions, last = train(corpus, 90)
    np.testing.assert_array_equal(np.concatenate(positions), np.arange(90 * 24))
    assert last.consumed_rows > 2 * last.epoch_rows
    state, digests = None, []
    for world_size, steps, micro_batch in [
        (1, 1, 24),
        (2, 20, 3),
        (4, 17, 6),
        (3, 1, 4),
        (3, 0, 4),
        (6, 40, 1),
        (1, 11, 8),
    ]:
        part, _, state = train(
            corpus, steps, world_size=world_size, micro_batch=micro_batch, state=state
        )
        digests += part
    assert digests == oracle
    assert state == last


def test_batches_are_those_of_the_first_version(make_corpus):
    """Rows, their order and their documents never change: a checkpoint of any version goes on with
    the same data.
    """
    digests, _, _ = train(make_corpus(), 90)
    assert hashlib.sha256(repr(digests).encode()).hexdigest().startswith("f3bab5c65023fd67")
    stream, documents = open_stream(make_corpus(), with_documents=True), hashlib.sha256()
    for _ in range(90):
        for rows in stream.take():
            documents.update(rows.document_ids_BL.numpy().tobytes())
        stream.advance()
    stream.close()
    assert documents.hexdigest().startswith("4a6085b263ba2c95")


@pytest.mark.parametrize(
    ("slab_tokens", "plan_rows", "prefetch_steps"),
    [(1, 1, 1), (3 * 24 * SEQ, 24 * 20, 2), (10**9, 24 * 11, 9), (5 * 24 * SEQ, 10**6, 40)],
)
def test_slabs_plans_and_prefetch_change_nothing(
    make_corpus, monkeypatch, slab_tokens, plan_rows, prefetch_steps
):
    corpus = make_corpus()
    oracle, positions, _ = train(corpus, 90)
    monkeypatch.setattr(loader, "SLAB_TOKENS", slab_tokens)
    monkeypatch.setattr(loader, "PLAN_ROWS", plan_rows)
    digests, other, _ = train(corpus, 90, prefetch_steps=prefetch_steps)
    assert digests == oracle
    np.testing.assert_array_equal(other, positions)


def test_one_epoch_holds_every_row_once(make_corpus):
    corpus = make_corpus()
    rows = TokenRows(corpus.folder, seq_len=SEQ)
    expected = np.concatenate(
        [
            np.lib.stride_tricks.sliding_window_view(tokens, SEQ + 1)[::SEQ]
            for tokens in corpus.tokens
        ]
    )
    stream = open_stream(corpus, global_batch=1, micro_batch=1)
    read = []
    for _ in range(int(rows.shard_rows.sum())):
        read.append(stream.take()[0].ids_BL.numpy().copy())
        stream.advance()
    stream.close()
    assert sorted(map(tuple, np.concatenate(read).tolist())) == sorted(
        map(tuple, expected.tolist())
    )


def test_micro_batches_and_their_fields(make_corpus):
    stream = open_stream(make_corpus(), place=Place(1, 2), micro_batch=4, with_documents=True)
    batches = stream.take()
    assert [rows.ids_BL.shape for rows in batches] == [(4, SEQ + 1)] * 3
    for rows in batches:
        assert rows.ids_BL.dtype == torch.int64
        assert rows.document_ids_BL.dtype == torch.int32
        assert (rows.document_ids_BL[:, 0] == 0).all()
        assert (rows.document_ids_BL.diff(dim=1) >= 0).all()
        assert rows.valid_B.all()
        assert rows.source_B.tolist() == [0] * 4
        assert rows.source_B.dtype == torch.int16
    # until advance(), the same step
    assert stream.take()[0].ids_BL.data_ptr() == batches[0].ids_BL.data_ptr()
    stream.close()


def test_a_taken_step_stays_while_the_reader_runs_ahead(make_corpus):
    stream = open_stream(make_corpus(), prefetch_steps=3)
    for _ in range(50):
        batch = stream.take()[0]
        before = batch.ids_BL.clone()
        time.sleep(0.002)  # the reader fills what it may
        assert torch.equal(before, batch.ids_BL)
        stream.advance()
    stream.close()


def test_the_state_moves_in_advance_only(make_corpus):
    stream = open_stream(make_corpus())
    stream.take()
    time.sleep(0.05)
    assert stream.state().consumed_rows == 0
    stream.advance()
    assert stream.state().consumed_rows == 24
    assert stream.state().to_dict()["consumed_tokens"] == 24 * SEQ
    stream.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "run.seed: 3 in the checkpoint, 4 now"),
        ({"seq_len": 16}, "data.seq_len: 32 .*, 16 now"),
        ({"lanes": 8}, "data.lanes: 7"),
        ({"block": 8}, "data.block"),
    ],
)
def test_a_resume_of_another_order_is_refused(make_corpus, change, named):
    corpus = make_corpus()
    _, _, state = train(corpus, 1)
    with pytest.raises(DataError, match=named):
        open_stream(corpus, state=state, **change)


def test_a_resume_on_other_data_is_refused(make_corpus):
    _, _, state = train(make_corpus(), 1)
    with pytest.raises(DataError, match=r"data\.sources"):
        open_stream(make_corpus(seed=1), state=state)
    with pytest.raises(DataError, match="version"):
        StreamState.from_dict({**state.to_dict(), "version": 99})


def test_a_stream_of_raw_text_of_before_goes_on_as_it_began():
    """Its state does not say how text was encoded: as then, where there are cursors in tokens of
    it.
    """
    state = StreamState("0", 1, 8, 4, 64, 100).to_dict()
    assert state["text"] == 2
    del state["text"]
    assert StreamState.from_dict(state).text == 2
    assert StreamState.from_dict({**state, "cursors": [[[0, 3]]]}).text == 1


def test_damage_stops_the_step_that_needs_it_and_no_earlier_one(make_corpus):
    corpus = make_corpus()
    whole, _, _ = train(corpus, 38, lanes=1, block=1)
    sorted(corpus.folder.glob("*.tar"))[4].unlink()
    stream = open_stream(corpus, lanes=1, block=1)
    good = 0
    with pytest.raises(DataError, match=r"text-000004\.tar"):  # noqa: PT012 (which take() raises depends on the order)
        while True:
            assert (
                sum(batch_digest([rows.ids_BL[:, :-1]]) for rows in stream.take()) % 2**64
                == whole[good]
            )
            stream.advance()
            good += 1
    with pytest.raises(DataError, match=r"text-000004\.tar"):
        stream.take()  # and stays so
    stream.close()
    assert stream.state().consumed_rows == 24 * good


@pytest.mark.parametrize("world_size", [1, 3])
def test_skipped_rows_keep_their_places(make_corpus, world_size):
    """With a shard missing, the same rows are not valid on any number of ranks, no other is
    touched, and evaluation leaves them out.
    """
    corpus = make_corpus()
    lost = sorted(corpus.folder.glob("*.tar"))[4]
    order = order_of(TokenRows(corpus.folder, seq_len=SEQ).shard_rows, seed=3, lanes=7, block=16)
    whole = open_stream(corpus)
    expected = [batch.ids_BL.clone() for batch in whole.take()]
    whole.close()
    lost.unlink()
    rows = TokenRows(corpus.folder, seq_len=SEQ, skip=True)
    streams = [
        Stream(
            rows if world_size == 1 else TokenRows(corpus.folder, seq_len=SEQ, skip=True),
            order,
            global_batch=24,
            micro_batch=2,
            place=Place(rank, world_size),
            with_documents=True,
        )
        for rank in range(world_size)
    ]
    for step in range(45):  # more than an epoch
        batches = [batch for stream in streams for batch in stream.take()]
        position, valid = (
            torch.cat([getattr(batch, name) for batch in batches]).numpy()
            for name in ("position", "valid_B")
        )
        np.testing.assert_array_equal(valid, order.locate(position).shard != 4)
        ids = torch.cat([batch.ids_BL for batch in batches])
        assert (ids[~torch.from_numpy(valid)] == 0).all()
        if step == 0 and world_size == 1:
            assert torch.equal(
                ids[torch.from_numpy(valid)], torch.cat(expected)[torch.from_numpy(valid)]
            )
        for stream in streams:
            stream.advance()
    for stream in streams:
        stream.close()
    n = rows.shard_rows
    ranks = [
        EvaluationRows(
            TokenRows(corpus.folder, seq_len=SEQ, skip=True),
            count=10**9,
            micro_batch=5,
            place=Place(rank, world_size),
        )
        for rank in range(world_size)
    ]
    assert sum(int(batch.valid_B.sum()) for rank in ranks for batch in rank) == n.sum() - n[4]


def test_close_ends_the_thread(make_corpus):
    before = threading.active_count()
    stream = open_stream(make_corpus())
    stream.take()
    stream.close()
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        stream.take()


# --------------------------------------------------------------------------------------- evaluation
def evaluation(corpus, world_size: int, **options) -> Iterator[EvaluationRows]:
    for rank in range(world_size):
        yield EvaluationRows(
            TokenRows(corpus.folder, seq_len=SEQ), place=Place(rank, world_size), **options
        )


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 8), (2, 4), (3, 5), (4, 32)])
def test_evaluation_scores_each_row_once_on_any_number_of_ranks(
    make_corpus, world_size, micro_batch
):
    corpus = make_corpus()
    [alone] = evaluation(corpus, 1, count=50, micro_batch=50)
    expected = batch_digest(rows.ids_BL for rows in alone)
    for _ in range(2):  # a second pass is the same
        ranks = list(evaluation(corpus, world_size, count=50, micro_batch=micro_batch))
        assert len({len(rank) for rank in ranks}) == 1
        valid = []
        for rank in ranks:
            batches = [(rows.ids_BL.clone(), rows.valid_B) for rows in rank]
            assert len(batches) == len(rank)
            assert all(len(ids) == micro_batch for ids, _ in batches)
            valid += [ids[keep] for ids, keep in batches]
        assert sum(len(ids) for ids in valid) == 50
        assert batch_digest(valid) == expected


def test_evaluation_rows_are_spread_over_the_data(make_corpus):
    corpus = make_corpus()
    [spread] = evaluation(corpus, 1, count=10, micro_batch=10)
    [rows] = spread
    places = [
        next(
            (s, at // SEQ)
            for s, tokens in enumerate(corpus.tokens)
            for at in range(0, len(tokens) - SEQ, SEQ)
            if (tokens[at : at + SEQ + 1] == row).all()
        )
        for row in rows.ids_BL.numpy()
    ]
    assert places == sorted(places)
    assert len({shard for shard, _ in places}) == 10
    [everything] = evaluation(corpus, 1, count=10**9, micro_batch=7, with_documents=True)
    assert (
        everything.count
        == everything.available
        == sum(int(rows.valid_B.sum()) for rows in everything)
    )
