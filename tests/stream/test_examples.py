"""The order of labelled examples: each once an epoch, the same steps for every cut, alike in
length.
"""

from __future__ import annotations

import numpy as np
import pytest

from hfscale.dist.world import Place
from hfscale.errors import DataError
from hfscale.stream.examples import ExampleOrder, ExampleRows, ExampleStream

RNG = np.random.default_rng(0)


def made(n: int) -> tuple[list[dict], np.ndarray]:
    lengths = RNG.integers(1, 100, n)
    return [{"input_ids": [i] * int(length)} for i, length in enumerate(lengths)], lengths


def stream(features, order, *, place=Place(), micro_batch=4, global_batch=24, state=None):
    return ExampleStream(
        features,
        order,
        fingerprint="f",
        global_batch=global_batch,
        micro_batch=micro_batch,
        place=place,
        state=state,
    )


def numbers(batches) -> list[int]:
    return [row["input_ids"][0] for batch in batches for row in batch.features]


@pytest.mark.parametrize("n", [50, 100, 5000, 9001])
def test_each_once_an_epoch(n):
    _, lengths = made(n)
    for grouped in (True, False):
        order = ExampleOrder(lengths, seed=1, grouped=grouped)
        epochs = [order.at(epoch * n, n) for epoch in range(3)]
        assert all((np.sort(epoch) == np.arange(n)).all() for epoch in epochs)
        assert (epochs[0] != epochs[1]).any()
        pieces = np.concatenate(
            [order.at(start, min(7, 2 * n - start)) for start in range(0, 2 * n, 7)]
        )
        assert (pieces == np.concatenate(epochs[:2])).all()


def test_steps_do_not_depend_on_the_cut_and_resume():
    features, lengths = made(500)
    order = ExampleOrder(lengths, seed=1, grouped=True)
    steps: dict[tuple, list] = {}
    for world_size, micro_batch in ((1, 24), (1, 4), (2, 4), (3, 4), (4, 2)):
        ranks = [
            stream(features, order, place=Place(rank, world_size), micro_batch=micro_batch)
            for rank in range(world_size)
        ]
        seen = []
        for _ in range(50):
            taken = [rank.take() for rank in ranks]
            assert len({len(batches) for batches in taken}) == 1
            seen.append(sorted(number for batches in taken for number in numbers(batches)))
            for rank in ranks:
                rank.advance()
        steps[world_size, micro_batch] = seen
        state = ranks[0].state().to_dict()
        for rank in ranks:
            rank.close()
    first, *others = steps.values()
    assert all(other == first for other in others)
    resumed, through = (
        stream(features, order, state=state),
        stream(features, order, state={**state, "consumed_rows": 0}),
    )
    for _ in range(50):
        through.advance()
    assert numbers(resumed.take()) == numbers(through.take())
    with pytest.raises(DataError, match="other examples"):
        stream(features, ExampleOrder(lengths, seed=2, grouped=True), state=state)


def test_batches_are_alike_in_length():
    features, lengths = made(20_000)
    padding = {}
    for grouped in (True, False):
        taken, asked = (
            stream(
                features,
                ExampleOrder(lengths, seed=1, grouped=grouped),
                global_batch=32,
                micro_batch=8,
            ),
            [],
        )
        for _ in range(40):
            asked += [[len(row["input_ids"]) for row in batch.features] for batch in taken.take()]
            taken.advance()
        padding[grouped] = sum(max(batch) * len(batch) for batch in asked) / sum(map(sum, asked))
    assert padding[True] < 1.05 and padding[False] > 1.3


@pytest.mark.parametrize(("n", "world_size"), [(1, 3), (10, 2), (12, 3), (25, 4)])
def test_validation_rows_come_once(n, world_size):
    features, lengths = made(n)
    ranks = [
        [*ExampleRows(features, lengths, micro_batch=3, place=Place(rank, world_size))]
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(
        number
        for batches in ranks
        for batch in batches
        for number in batch.position[batch.valid_B].tolist()
    ) == [*range(n)]
