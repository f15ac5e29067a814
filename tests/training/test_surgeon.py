"""The rows to blame are found by halving, alone where they explain what was wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from hfscale.stream.left_out import LeftOut, Span
from hfscale.training.surgeon import to_blame

ROWS = (64, 96)


class Step:
    """A step whose figure is the mean of its rows'."""

    def __init__(self, bad: dict[int, float]) -> None:
        self.figures = {row: bad.get(row, 1.0) for row in range(*ROWS)}
        self.tried = 0

    def __call__(self, spans: Sequence[Span]) -> float:
        self.tried += 1
        left_out = LeftOut(spans)
        kept = [figure for row, figure in self.figures.items() if not left_out.count(row, row + 1)]
        return sum(kept) / max(1, len(kept))


@pytest.mark.parametrize("bad", [{71: 90.0}, {64: math.nan}, {95: 40.0, 66: 80.0, 80: math.inf}])
def test_the_rows_to_blame_are_named(bad: dict[int, float]) -> None:
    step = Step(bad)
    blamed = to_blame(ROWS, step, ordinary=lambda value: value < 1.5)
    assert blamed == [(row, row + 1) for row in sorted(bad)]
    assert step.tried == 1 + len(bad) * (2 * 5 + 1)


def test_a_step_that_no_few_rows_explain_goes_as_a_whole() -> None:
    assert to_blame(ROWS, Step(dict.fromkeys(range(70, 80), 9.0)), ordinary=(1.5).__gt__) == [ROWS]


def test_a_step_that_is_ordinary_by_now_goes_as_a_whole() -> None:
    assert to_blame(ROWS, Step({}), ordinary=lambda value: value < 1.5) == [ROWS]
