"""Any chain of stops and sizes yields the rows of a naive oracle of one process: 100 layouts here,
thousands in benchmarks/elastic.py.
"""

from __future__ import annotations

import random

import pytest

from hfscale.stream import order
from tests.helpers.elastic import compare, draw


@pytest.mark.parametrize("first", range(0, 100, 10))
def test_the_rows_of_a_chain_are_those_of_the_oracle(first: int) -> None:
    assert sum(compare(draw(random.Random(first + k))) for k in range(10)) > 1000


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("ROUNDS", 5),
        ("_BLOCKS", 3),
        ("_SHARDS", 5),
        ("deal", lambda positions, lanes, *, place: positions[:, ::2]),
    ],
)
def test_the_oracle_notices_another_order(
    monkeypatch: pytest.MonkeyPatch, what: str, wrong: object
) -> None:
    monkeypatch.setattr(order, what, wrong)
    monkeypatch.setattr("hfscale.stream.mixture.deal", order.deal)
    with pytest.raises(AssertionError):
        sum(compare(draw(random.Random(k))) for k in range(10))
