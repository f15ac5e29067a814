"""A mixture in closed form against counting, and what stages, caps and resumes with other weights
do to each source's own order.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfscale.checkpoint.state import CheckpointState
from hfscale.config.schema import RunConfig
from hfscale.dist.world import Place
from hfscale.errors import ConfigError, DataError
from hfscale.stream.digest import batch_digest
from hfscale.stream.loader import Stream
from hfscale.stream.mixture import Mixture, Phase, plan, share
from hfscale.stream.order import Order
from hfscale.stream.rows import TokenRows
from hfscale.stream.sources import open_mixture

SEQ = 32


def make(sizes, stages, *, block, caps=None, seed=1, **resume) -> Mixture:
    orders = [
        Order([size // 2, size - size // 2], seed=seed + s, lanes=min(3, size), block=4)
        for s, size in enumerate(sizes)
    ]
    phases, end = plan(stages, block=block, caps=caps or [None] * len(sizes), **resume)
    return Mixture(
        orders,
        fingerprints={f"s{s}": str(s) * 64 for s in range(len(sizes))},
        phases=phases,
        end=end,
    )


def brute_force(stages, block: int, caps, rows: int) -> list[tuple[int, list[int]]]:
    """Return (first row, rows of each source) of every block, one after the other."""
    used, at, blocks = [0] * len(caps), 0, []
    while at < rows:
        size = min([block, *(row - at for row, _ in stages if row > at)])
        weights = [weights for row, weights in stages if row <= at][-1]
        counts = list(
            share(weights, size, [None if cap is None else cap - n for cap, n in zip(caps, used)])
        )
        if not any(counts):
            break
        blocks.append((at, counts))
        at, used = at + sum(counts), [n + count for n, count in zip(used, counts)]
    return blocks


@st.composite
def layouts(draw):
    count = draw(st.integers(1, 4))
    weights = st.lists(
        st.sampled_from([0, 0.1, 0.3, 1, 2, 7]), min_size=count, max_size=count
    ).filter(any)
    rows = draw(st.lists(st.integers(1, 300), max_size=3, unique=True).map(sorted))
    sizes = draw(st.lists(st.integers(2, 60), min_size=count, max_size=count))
    caps = [draw(st.none() | st.integers(1, 150)) for _ in range(count)]
    return sizes, [(row, draw(weights)) for row in (0, *rows)], draw(st.integers(1, 40)), caps


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_closed_form_is_counting(layout):
    """Block by block: each source's rows are its next ones, all of them; and any position alone
    gives what it gives among others.
    """
    sizes, stages, block, caps = layout
    mixture = make(sizes, stages, block=block, caps=caps)
    blocks = brute_force(stages, block, caps, 500)
    total = blocks[-1][0] + sum(blocks[-1][1])
    assert mixture.end is None or total == mixture.end or total >= 500
    source, cursor = mixture.place(np.arange(total))
    used = np.zeros(len(sizes), dtype=int)
    for at, counts in blocks:
        inside = slice(at, at + sum(counts))
        for s, count in enumerate(counts):
            assert sorted(cursor[inside][source[inside] == s]) == list(
                range(used[s], used[s] + count)
            )
        used += counts
        assert mixture.consumed(at + sum(counts)).tolist() == used.tolist()
    assert all(cap is None or n <= cap for n, cap in zip(used, caps))
    for p in (0, total // 2, total - 1):
        assert [int(x[0]) for x in mixture.place(np.array([p]))] == [source[p], cursor[p]]
        assert (
            mixture.consumed(p).tolist() == np.bincount(source[:p], minlength=len(sizes)).tolist()
        )


@settings(max_examples=200, deadline=None)
@given(layouts(), layouts(), st.lists(st.integers(0, 200), min_size=1, max_size=4))
def test_any_chain_of_weights_repeats_and_loses_nothing(layout, other, steps):
    """At each stop the weights, stages, caps and block change to and fro; each source still gives
    its rows one after the other.
    """
    sizes, consumed, past, read = layout[0], 0, [], []
    for turn, count in enumerate(steps):
        _, stages, _, caps = (layout, other)[turn % 2]
        fit = [(row, (*weights, *[1] * 4)[: len(sizes)]) for row, weights in stages]
        if not any(fit[0][1]):
            continue
        mixture = make(
            sizes,
            fit,
            block=layout[2],
            caps=(*caps, *[None] * 4)[: len(sizes)],
            past=past,
            consumed=consumed,
        )
        stop = min(
            consumed + count,
            consumed + count if mixture.end is None else max(consumed, mixture.end),
        )
        read += list(zip(*(x.tolist() for x in mixture.place(np.arange(consumed, stop)))))
        consumed = stop
        whole = mixture.record(consumed).get("phases", [])
        past = (
            [Phase(begin, tuple(counts)) for begin, counts in whole]
            if len(sizes) > 1
            else [Phase(0, (1,))]
        )
        assert len(set(read)) == len(read)
        after = plan(
            fit,
            block=layout[2],
            caps=(*caps, *[None] * 4)[: len(sizes)],
            past=past,
            consumed=consumed,
        )
        full = make(
            sizes,
            fit,
            block=layout[2],
            caps=(*caps, *[None] * 4)[: len(sizes)],
            past=past,
            consumed=consumed,
        )
        # as before: nothing has changed
        assert after[1] == mixture.end or (mixture.end is not None and consumed >= mixture.end)
        rest = np.arange(
            consumed, consumed + 100 if full.end is None else min(consumed + 100, full.end)
        )
        if len(rest):
            np.testing.assert_array_equal(full.place(rest), mixture.place(rest))
    # to the end of the block, every source has given a whole stretch from its first row on
    if read and len(sizes) > 1:
        last = max(
            begin + (consumed - begin + sum(c) - 1) // sum(c) * sum(c) for begin, c in past[-1:]
        )
        read += list(zip(*(x.tolist() for x in mixture.place(np.arange(consumed, last)))))
    for s in range(len(sizes)):
        rows = sorted(row for source, row in read if source == s)
        assert rows == list(range(len(rows)))


def test_one_source_is_its_own_order():
    mixture = make([40], [(0, [0.3])], block=1)
    order = mixture.orders[0]
    positions = np.random.default_rng(0).integers(0, 400, 100)
    for ours, theirs in zip(
        vars(mixture.locate(positions)).values(), vars(order.locate(positions)).values()
    ):
        np.testing.assert_array_equal(ours, theirs)
    # by lane, as that order has them
    step = mixture.steps(24, count=1, global_batch=12, place=Place())
    assert np.diff(order.locate(step[0]).lane).min() == 0 and sorted(step[0]) == list(range(24, 36))
    assert (mixture.record(100), mixture.epochs(100)) == ({}, {"epoch": 2.5})


@pytest.mark.parametrize(
    "weights",
    [(0.7, 0.3), (0.5, 0.25, 0.125, 0.125), (1, 1, 1), (0.9, 0.0999, 0.001), (3.7, 11.2, 0.41)],
)
def test_realised_shares_are_within_a_thousandth(weights):
    mixture = make([1000] * len(weights), [(0, weights)], block=1024)
    for rows in (20 * 1024, 10**6, 123_456_789):
        shares = mixture.consumed(rows) / rows
        assert np.abs(shares - np.array(weights) / sum(weights)).max() < 1e-3


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_every_number_of_ranks_gets_the_same_steps(layout, start, ranks):
    sizes, stages, block, _ = layout
    mixture = make(sizes, stages, block=block)
    shares = [
        mixture.steps(start, count=3, global_batch=12, place=Place(rank, ranks))
        for rank in range(ranks)
    ]
    np.testing.assert_array_equal(
        np.sort(np.concatenate(shares, axis=1), axis=1), start + np.arange(36).reshape(3, 12)
    )


def test_the_mixture_never_changes_between_versions():
    """A run made by an older version resumes on its own order: these numbers are a promise."""
    mixture = make(
        [50, 30, 9], [(0, [0.5, 0.3, 0.2]), (25, [0.1, 0.1, 0.8])], block=10, caps=[None, None, 12]
    )
    source, cursor = mixture.place(np.arange(14, 44))
    assert list(zip(source.tolist(), cursor.tolist())) == GOLDEN


GOLDEN = [
    (0, 6),
    (1, 3),
    (0, 8),
    (2, 2),
    (1, 4),
    (0, 9),
    (0, 12),
    (0, 11),
    (1, 6),
    (2, 4),
    (0, 10),
    (2, 7),
    (0, 13),
    (2, 5),
    (2, 6),
    (1, 7),
    (2, 9),
    (2, 8),
    (0, 14),
    (2, 10),
    (2, 11),
    (1, 9),
    (1, 10),
    (1, 12),
    (1, 8),
    (0, 19),
    (0, 15),
    (0, 18),
    (0, 17),
    (1, 11),
]


def test_shares_of_a_block():
    assert share([0.7, 0.3], 10, [None, None]) == (7, 3)
    assert share([1, 1, 1], 10, [None] * 3) == (4, 3, 3)
    assert share([0.5, 0.25, 0.25], 8, [None, 1, None]) == (5, 1, 2)
    assert share([0, 1], 8, [None, 3]) == (0, 3)  # the others have no weight
    assert share([1, 1], 8, [0, 0]) == (0, 0)


# ------------------------------------------------------------------------------------ from a config
def config_of(data: dict[str, Any], **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "x", "seed": 3},
            "tokenizer": {"path": "none"},
            "model": {"architecture": "gpt2"},
            "objective": {"name": "clm"},
            "data": {"seq_len": SEQ, "block": 16, "lanes": 4, **data},
            "train": {"steps": 90, "global_batch": 24, "micro_batch": 2, **train},
        }
    )


def open_parts(
    config: RunConfig, saved: CheckpointState | None = None
) -> tuple[TokenRows, Mixture]:
    return open_mixture(
        config,
        [TokenRows(source.shards, seq_len=SEQ) for source in config.data.sources],
        saved=saved,
    )


def train(
    config: RunConfig, steps: int, *, world_size: int = 1, saved: CheckpointState | None = None
):
    """Return (digest, source and position of each row) of each step over all ranks, and what a
    checkpoint after them says.
    """
    streams = []
    for rank in range(world_size):
        rows, order = open_parts(config, saved)
        streams.append(
            Stream(
                rows,
                order,
                global_batch=24,
                micro_batch=2,
                place=Place(rank, world_size),
                state=saved.position if saved else None,
                with_documents=True,
            )
        )
    digests, seen = [], []
    for _ in range(steps):
        batches = [rows for stream in streams for rows in stream.take()]
        digests.append(sum(batch_digest([rows.ids_BL[:, :-1]]) for rows in batches) % 2**64)
        seen += [
            (int(s), tuple(ids))
            for rows in batches
            for s, ids in zip(rows.source_B, rows.ids_BL.tolist())
        ]
        for stream in streams:
            stream.advance()
    [text] = {json.dumps(stream.state().to_dict()) for stream in streams}
    for stream in streams:
        stream.close()
    assert len(text) < 1024
    return (
        digests,
        seen,
        CheckpointState(step=(saved.step if saved else 0) + steps, stream=json.loads(text)),
    )


@pytest.fixture(scope="module")
def web(make_corpus) -> Path:
    return make_corpus(30_000).folder


@pytest.fixture(scope="module")
def code(make_corpus) -> Path:
    return make_corpus(20_000, seed=1).folder


@pytest.fixture(scope="module")
def maths(make_corpus) -> Path:
    return make_corpus(9_000, seed=2).folder


def sources(**weights: tuple[Path, float] | tuple[Path, float, float]) -> dict[str, Any]:
    return {
        "sources": [
            {
                "name": name,
                "shards": str(folder),
                "weight": weight,
                "max_epochs": cap[0] if cap else None,
            }
            for name, (folder, weight, *cap) in weights.items()
        ]
    }


def rows_of(folder: Path) -> set[tuple[int, ...]]:
    rows = TokenRows(folder, seq_len=SEQ)
    shards = np.repeat(np.arange(len(rows.shard_rows)), rows.shard_rows)
    ids = np.empty((len(shards), SEQ + 1), np.int64)
    rows.fill(shards, np.concatenate([np.arange(n) for n in rows.shard_rows]), ids)
    return set(map(tuple, ids.tolist()))


def test_any_chain_of_stops_gives_the_uninterrupted_run(web, code, maths):
    """With a stage in the middle, a cap that is reached, and rows of each source that are really
    its own.
    """
    mixed = config_of(
        {
            **sources(web=(web, 0.6), code=(code, 0.3), maths=(maths, 0.1, 1.0)),
            "stages": [{"at": 40, "weights": {"maths": 0.4}}],
        }
    )
    oracle, seen, last = train(mixed, 90)
    saved, digests = None, []
    for world_size, steps in [(1, 1), (2, 20), (4, 17), (3, 1), (3, 0), (6, 40), (1, 11)]:
        part, _, saved = train(mixed, steps, world_size=world_size, saved=saved)
        digests += part
    assert digests == oracle
    assert saved == last
    for number, folder in enumerate((web, code, maths)):
        times = Counter(ids for source, ids in seen if source == number)
        assert set(times) <= rows_of(folder)
        assert max(times.values()) - min(times.values()) <= 1  # exactly once an epoch
    # its one epoch, all of it
    assert Counter(ids for source, ids in seen if source == 2) == Counter(rows_of(maths))


def test_other_weights_and_a_new_source_on_a_resume_repeat_and_lose_nothing(web, code, maths):
    alone = config_of(sources(text=(web, 1)))
    # a new source, before the old one, which also has a new name
    two = config_of(sources(code=(code, 0.5), renamed=(web, 0.5)))
    three = config_of(sources(code=(code, 0.2), renamed=(web, 0.3), maths=(maths, 0.5)))
    stopped = config_of(sources(code=(code, 0), renamed=(web, 0.3), maths=(maths, 0.5)))
    seen, saved = [], None
    for changed, steps in [(alone, 7), (two, 5), (three, 6), (stopped, 4)]:
        digests, part, after = train(changed, steps, saved=saved)
        assert train(changed, steps, world_size=3, saved=saved)[::2] == (digests, after)
        seen, saved = seen + part, after
    assert list(saved.stream["sources"]) == ["renamed", "code", "maths"]
    taken = [Counter(ids for source, ids in seen if source == number) for number in range(3)]
    assert [sum(times.values()) for times in taken] == [
        rows for _, rows in saved.stream["sources"].values()
    ]
    assert all(max(times.values()) == 1 for times in taken)
    assert saved.stream["phases"][0] == [0, [1, 0, 0]]
    # the first source goes on in its own order, as if it had been alone
    oracle = train(alone, 22)[1]
    assert set(taken[0]) >= {ids for _, ids in oracle[: sum(taken[0].values()) - 16]}


def test_the_state_stays_small(make_corpus):
    parts = [TokenRows(make_corpus(2000, seed=s).folder, seq_len=SEQ) for s in range(10)]
    values = {
        "sources": [
            {"name": f"source-{s}", "shards": str(part.manifest.folder)}
            for s, part in enumerate(parts)
        ],
        "block": 1024,
        "stages": [{"at": 1000 * n, "weights": {"source-0": n + 1}} for n in range(1, 4)],
        "lanes": "auto",
    }
    rows, order = open_mixture(config_of(values, steps=10**6), parts)
    stream = Stream(rows, order, global_batch=24, micro_batch=2, place=Place())
    stream._consumed = 24 * 10**6
    assert len(json.dumps(stream.state().to_dict())) < 1024
    assert len(stream.epochs()["source_epoch"]) == 10
    stream.close()


def test_what_cannot_be_mixed_is_refused(web, code, maths, make_corpus):
    with pytest.raises(ConfigError, match=r"code is too small[\s\S]*data.sources"):
        open_parts(config_of(sources(web=(web, 1), code=(code, 0.01))))
    with pytest.raises(ConfigError, match=r"code is too small[\s\S]*data.stages.0.weights"):
        open_parts(
            config_of(
                {
                    **sources(web=(web, 1), code=(code, 1)),
                    "stages": [{"at": 0.5, "weights": {"code": 0.01}}],
                }
            )
        )
    with pytest.raises(
        ConfigError, match=r"after the one before it[\s\S]*data.stages.1.at[\s\S]*step 45"
    ):
        open_parts(
            config_of(
                {
                    **sources(web=(web, 1), code=(code, 1)),
                    "stages": [
                        {"at": 50, "weights": {"code": 2}},
                        {"at": 0.5, "weights": {"code": 1}},
                    ],
                }
            )
        )
    with pytest.raises(ConfigError, match=r"max_epochs after step 64 of 90"):
        open_parts(config_of(sources(web=(web, 1, 1), code=(code, 1, 1))))
    with pytest.raises(ConfigError, match="max_epochs after step 38"):
        open_parts(config_of(sources(web=(web, 1, 1))))
    with pytest.raises(
        DataError,
        match=r"unlike dtypes[\s\S]*'uint16': 'web', 'uint32': 'wide'[\s\S]*one tokenizer "
        r"gives one dtype",
    ):
        open_parts(
            config_of(sources(web=(web, 1), wide=(make_corpus(2_000, dtype="uint32").folder, 1)))
        )
    _, _, saved = train(config_of(sources(web=(web, 0.5), code=(code, 0.5))), 3)
    with pytest.raises(DataError, match=r"code of the checkpoint is gone[\s\S]*weight 0"):
        open_parts(config_of(sources(web=(web, 0.5), maths=(maths, 0.5))), saved)
    with pytest.raises(DataError, match=r"code of the checkpoint has other data"):
        open_parts(config_of(sources(web=(web, 0.5), code=(maths, 0.5))), saved)


def test_a_stream_never_goes_beyond_its_end(web, code):
    rows, order = open_parts(config_of(sources(web=(web, 1, 0.1), code=(code, 1, 0.1)), steps=6))
    stream = Stream(rows, order, global_batch=24, micro_batch=2, place=Place())
    for _ in range(order.end // 24):
        stream.take()
        stream.advance()
    with pytest.raises(DataError, match="max_epochs"):
        stream.take()
    stream.close()
