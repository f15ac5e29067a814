"""The table of the tour."""

from __future__ import annotations

from benchmarks.tour import cell, ends
from hfscale.metrics.kept import Scores


def test_a_score_that_no_draw_moves_stands_without_an_interval():
    """As that of a baseline that finds nothing."""
    scored = Scores(
        model="m", scores={"f1": 0.0, "accuracy": 0.5}, intervals={"accuracy": (0.4, 0.6)}
    )
    assert cell(scored, "f1") == "0.000"
    assert cell(scored, "accuracy") == "0.500 (0.400 - 0.600)"
    assert ends(scored, "f1") == (0.0, 0.0)
    assert ends(scored, "accuracy") == (0.4, 0.6)
