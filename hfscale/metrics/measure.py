"""Scores with confidence intervals: what every metric of this room returns.

The bootstrap asks what the scores would be for other draws of as many examples. A draw is nothing
but *weights*: how often each example is in it. So a ``Measure`` is a function from weights to
scores, vectorised over draws; the plain scores are those of all weights 1. Most metrics, corpus
metrics such as BLEU among them, are a function of sums over examples, and a thousand draws cost one
matrix product. Shape legend: N examples, R draws, K sums.

Where all examples agree, all draws do, and the bootstrap would promise what five of five right do
not hold. So the intervals of plain proportions of examples are Wilson's, and of other scores that
no draw moves there is none. Sources: Efron and Tibshirani 1993, An Introduction to the Bootstrap,
sec. 13.3 (percentile intervals); Wilson 1927, Probable inference, the law of succession, and
statistical inference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import nan, sqrt
from statistics import NormalDist

import numpy as np

from hfscale.errors import DataError

Scores = dict[str, np.ndarray]
NUMBERS_IN_FLIGHT = 1 << 22  # weights held at a time: 32 MiB


@dataclass(frozen=True)
class Proportion:
    """So many right of so many examples; ``scale`` times that is the score."""

    right: float
    asked: float
    scale: float = 1.0

    def interval(self, *, confidence: float = 0.95) -> tuple[float, float]:
        """Return Wilson's interval of the score; NaN of none asked."""
        if not self.asked:
            return nan, nan
        z, n, p = NormalDist().inv_cdf((1 + confidence) / 2), self.asked, self.right / self.asked
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        return self.scale * max(0.0, middle - half), self.scale * min(1.0, middle + half)


@dataclass(frozen=True)
class Measure:
    """The scores of N examples for any weights of them."""

    examples: int
    of: Callable[[np.ndarray], Scores]  # weights_RN -> {name: scores_R}
    # what a reader must know to compare: sacreBLEU's signature
    notes: dict[str, str] = field(default_factory=dict)
    # of the scores that are shares of examples
    proportions: dict[str, Proportion] = field(default_factory=dict)

    def scores(self) -> dict[str, float]:
        """Return ``{name: score}``."""
        plain = self._of(np.ones((1, self.examples)))
        return {name: float(score_R[0]) for name, score_R in plain.items()}

    def intervals(
        self, *, confidence: float = 0.95, draws: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Return ``{name: (low, high)}``: Wilson's of proportions, else the percentile bootstrap
        over examples; equal for equal ``seed``.

        NaN where no draw moves a score: that says nothing about it.
        """
        rng, N = np.random.default_rng(seed), self.examples
        at_once = max(1, NUMBERS_IN_FLIGHT // N)
        parts: list[Scores] = []
        for begin in range(0, draws, at_once):
            R = min(at_once, draws - begin)
            drawn_RN = rng.integers(N, size=(R, N)) + N * np.arange(R)[:, None]
            times_RN = np.bincount(drawn_RN.ravel(), minlength=R * N).reshape(R, N)
            parts.append(self._of(times_RN.astype(float)))
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        intervals: dict[str, tuple[float, float]] = {}
        for name in self.scores():
            drawn = np.concatenate([part[name] for part in parts])
            low, high = np.nanquantile(drawn, tails)
            intervals[name] = (float(low), float(high)) if low < high else (nan, nan)
        for name, share in self.proportions.items():
            intervals[name] = share.interval(confidence=confidence)
        return intervals

    def __or__(self, other: Measure) -> Measure:
        """Return both measures, of the same examples, as one."""
        assert self.examples == other.examples
        return Measure(
            self.examples,
            lambda weights: self.of(weights) | other.of(weights),
            self.notes | other.notes,
            self.proportions | other.proportions,
        )

    def _of(self, weights_RN: np.ndarray) -> Scores:
        with np.errstate(divide="ignore", invalid="ignore"):  # what is undefined is NaN
            return self.of(weights_RN)


def from_sums(
    rows_NK: Sequence[Sequence[float]] | np.ndarray,
    finish: Callable[[np.ndarray], Scores],
    **notes: str,
) -> Measure:
    """Return the measure that ``finish`` computes from sums of the rows: sums_RK -> {name:
    scores_R}.
    """
    table_NK = np.asarray(rows_NK, dtype=float)
    return Measure(len(table_NK), lambda weights_RN: finish(weights_RN @ table_NK), notes)


def mean(values: dict[str, Sequence[float]], *, proportions: Sequence[str] = ()) -> Measure:
    """Return the means of values of each example; those of ``proportions`` are 0 or 1."""
    names = list(values)
    rows_NK = np.array([values[name] for name in names], dtype=float).T
    measured = from_sums(
        np.c_[rows_NK, np.ones(len(rows_NK))],
        lambda sums: {name: sums[:, k] / sums[:, -1] for k, name in enumerate(names)},
    )
    shares = {name: Proportion(float(np.sum(values[name])), len(rows_NK)) for name in proportions}
    return replace(measured, proportions=shares)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return ``part / whole``, and 0 where ``whole`` is 0."""
    shares: np.ndarray = np.divide(
        part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0
    )
    return shares


def paired(predictions: Sequence[object], references: Sequence[object]) -> int:
    """Return how many examples there are.

    Raises:
        DataError: if there are none, or not as many predictions as references.
    """
    if len(predictions) != len(references) or not references:
        raise DataError(
            "scores need examples, and one prediction for each",
            value=f"{len(predictions)} predictions, {len(references)} references",
        )
    return len(references)
