from __future__ import annotations

import os
import resource

import numpy as np
import pytest

from hfscale.errors import DataError
from hfscale.shards.manifest import Manifest
from hfscale.stream.rows import TokenRows
from tests.objectives.rows import make_rows


def every_row(rows: TokenRows) -> tuple[np.ndarray, np.ndarray]:
    shards = np.repeat(np.arange(len(rows.shard_rows)), rows.shard_rows)
    return shards, np.concatenate([np.arange(n) for n in rows.shard_rows])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("seq_len", [8, 100, 1000])  # 1000: every row crosses a chunk
@pytest.mark.parametrize("few", [False, True])
def test_rows_are_the_tokens(make_corpus, dtype, seq_len, few):
    """Every row of every shard, in a random order, all prepared at once or few at a time, and
    copied in parts; with documents.
    """
    corpus = make_corpus(dtype=dtype)
    rows = TokenRows(corpus.folder, seq_len=seq_len)
    assert rows.shard_rows.tolist() == [(len(tokens) - 1) // seq_len for tokens in corpus.tokens]
    shards, numbers = every_row(rows)
    mixed = np.random.default_rng(1).permutation(len(shards))
    per = 1 if few else 3  # rows of a micro-batch
    mixed = mixed[: len(mixed) // per * per]
    for some in np.array_split(mixed.reshape(-1, per), min(50, len(mixed)) if few else 1):
        some = some.ravel()
        prepared = rows.prepare(shards[some], numbers[some], documents_per=per)
        assert len(prepared.boundaries) == len(some) // per
        assert prepared.valid.all()
        for begin in range(0, len(some), per):
            ids_BL = np.full((per, seq_len + 1), -1)
            prepared.fill(slice(begin, begin + per), ids_BL)
            boundaries = []
            for k, (shard, number) in enumerate(
                zip(
                    shards[some[begin : begin + per]],
                    numbers[some[begin : begin + per]],
                    strict=True,
                )
            ):
                first, last = number * seq_len, (number + 1) * seq_len + 1
                np.testing.assert_array_equal(ids_BL[k], corpus.tokens[shard][first:last])
                # a document begins where the one before has ended
                begins = np.isin(np.arange(first + 1, last), corpus.ends[shard])
                boundaries += (k * seq_len + np.flatnonzero(begins)).tolist()
            assert prepared.boundaries[begin // per].tolist() == boundaries


def test_documents_are_numbered_within_their_row():
    rows = make_rows([[3, 4], [7], [1, 5, 1]])
    assert rows.boundaries.tolist() == [2, 12, 17]
    assert rows.document_ids_BL.tolist() == [[0, 0, 0, 1, 1, 1, 1], [0] * 7, [0, 1, 1, 1, 1, 1, 2]]


def test_rows_in_order_are_the_tokens_too(make_corpus):
    """Rows that follow each other are copied as one slice, also over the edges of chunks and
    shards, and where two are the same.
    """
    corpus = make_corpus()
    rows = TokenRows(corpus.folder, seq_len=8)
    shards, numbers = every_row(rows)
    shards, numbers = (
        np.concatenate([shards, shards[:1], shards[:1], shards[4::-1]]),
        np.concatenate([numbers, [0, 0], numbers[4::-1]]),
    )
    prepared = rows.prepare(shards, numbers)
    for begin in range(0, len(shards), 7):
        part = slice(begin, min(begin + 7, len(shards)))
        ids_BL = np.full((part.stop - begin, 9), -1, dtype=np.int32)
        prepared.fill(part, ids_BL)
        for ids, shard, number in zip(ids_BL, shards[part], numbers[part], strict=True):
            np.testing.assert_array_equal(ids, corpus.tokens[shard][number * 8 : number * 8 + 9])


def test_neighbours_share_one_token_and_nothing_is_left_over(make_corpus):
    corpus = make_corpus()
    rows = TokenRows(corpus.folder, seq_len=50)
    shards, numbers = every_row(rows)
    ids = np.empty((len(shards), 51), dtype=np.int64)
    rows.fill(shards, numbers, ids)
    targets = sum(rows.shard_rows * 50)
    # less than a row of each shard is never a target
    assert targets > sum(len(tokens) - 1 - 50 for tokens in corpus.tokens)
    assert (ids[:-1, -1] == ids[1:, 0])[np.diff(shards) == 0].all()


def test_shards_beyond_the_limit_are_closed_and_opened_again(make_corpus, monkeypatch):
    corpus = make_corpus(tokens=60_000, chunk_tokens=300, shard_chunks=2)
    with monkeypatch.context() as patch:  # told, not set: other tests' ranks hold files here
        patch.setattr(resource, "getrlimit", lambda _: (64, 64))
        rows = TokenRows(corpus.folder, seq_len=64)
    shards, numbers = every_row(rows)
    ids = np.empty((len(shards), 65), dtype=np.int64)
    for _ in range(2):
        before = len(os.listdir("/proc/self/fd"))
        prepared = rows.prepare(shards, numbers)
        assert len(rows._open) == 32 < len(corpus.tokens)
        # what is prepared holds few files beside those
        assert len(os.listdir("/proc/self/fd")) <= before + 32 + 10
        prepared.fill(slice(0, len(shards)), ids)
        assert all(
            (ids[k] == corpus.tokens[s][r * 64 : r * 64 + 65]).all()
            for k, (s, r) in enumerate(zip(shards, numbers, strict=True))
        )


def test_damage_is_named(make_corpus):
    corpus = make_corpus()
    tar = sorted(corpus.folder.glob("*.tar"))[1]
    content = bytearray(tar.read_bytes())
    place = content.index(corpus.tokens[1][700:].tobytes()[:64])  # in the second chunk
    content[place + 10] ^= 1
    tar.write_bytes(content)
    ids = np.empty((1, 65), dtype=np.int64)
    one = np.array([1])
    with pytest.raises(
        DataError, match=rf"000000001.tokens.bin at offset {place:,}[\s\S]*{tar.name}"
    ):
        TokenRows(corpus.folder, seq_len=64).fill(one, np.array([11]), ids)
    many = np.arange(20)
    with pytest.raises(DataError, match=r"000000001\.tokens\.bin"):
        TokenRows(corpus.folder, seq_len=64).fill(
            np.full(20, 1), many, np.empty((20, 65), dtype=np.int64)
        )
    TokenRows(corpus.folder, seq_len=64, verify=False).fill(one, np.array([11]), ids)
    TokenRows(corpus.folder, seq_len=64).fill(one, np.array([2]), ids)  # the first chunk is whole
    np.testing.assert_array_equal(ids[0], corpus.tokens[1][128:193])
    tar.unlink()
    with pytest.raises(DataError, match=tar.name):
        TokenRows(corpus.folder, seq_len=64).fill(one, np.array([2]), ids)


def test_what_cannot_be_rows_is_refused(make_corpus, tmp_path):
    with pytest.raises(DataError, match="no manifest"):
        TokenRows(tmp_path, seq_len=8)
    corpus = make_corpus(tokens=50)
    with pytest.raises(
        DataError, match=r"no shard is as long as a row[\s\S]*50[\s\S]*data.seq_len \+ 1 = 51"
    ):
        TokenRows(corpus.folder, seq_len=50)
    assert TokenRows(corpus.folder, seq_len=49).shard_rows.tolist() == [1]
    Manifest(dtype="text", tokenizer=None, source={"field": "txt"}, shards=()).save(tmp_path)
    assert TokenRows(tmp_path, seq_len=8).raw and not len(TokenRows(tmp_path, seq_len=8).shard_rows)
