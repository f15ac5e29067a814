"""Which rows of a step are to blame for what was wrong with it, asked of the weights of the
checkpoint before.

The step is run again and again, each time with other rows left out, on all ranks and by the path
that trains; its update is never made, so the weights stay as they are, bit for bit. The half with
the larger gradient (or loss) is halved again until one row is left: two passes a halving, 20 for a
batch of 1,024. If the step is ordinary without that row, it alone is to blame; if not, the next is
looked for. Where a few rows do not explain it, the whole step is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hfscale.stream.left_out import Span

MOST_ROWS = 4  # to blame; more, and the whole step is

# a step without the rows in the spans -> the figure that was wrong with it
Trial = Callable[[Sequence[Span]], float]


def to_blame(rows: Span, trial: Trial, *, ordinary: Callable[[float], bool]) -> list[Span]:
    """Return the rows of a step, as positions, without which its figure is ``ordinary``.

    All ranks call this together, and ``trial`` gives all of them the same.
    """
    whole = [rows]
    if ordinary(trial([])):
        return whole  # with the weights of then it was nothing
    blamed: list[Span] = []
    for _ in range(min(MOST_ROWS, rows[1] - rows[0] - 1)):
        blamed.append(_worst(rows, trial, without=blamed))
        if ordinary(trial(blamed)):
            return sorted(blamed)
    return whole


def _worst(rows: Span, trial: Trial, *, without: Sequence[Span]) -> Span:
    """Return the one row whose figure is the largest, by halving; but none of ``without``."""
    first, stop = rows
    while stop - first > 1:
        middle = (first + stop) // 2
        halves = [(first, middle), (middle, stop)]
        figures = [_figure(trial, _others(rows, half) + [*without]) for half in halves]
        first, stop = halves[1] if figures[1] > figures[0] else halves[0]
    return first, stop


def _others(rows: Span, kept: Span) -> list[Span]:
    return [(rows[0], kept[0]), (kept[1], rows[1])]


def _figure(trial: Trial, spans: Sequence[Span]) -> float:
    """Return the figure; one that is no number is worse than any."""
    value = trial(spans)
    return math.inf if math.isnan(value) else value
