"""Pearson's and Spearman's correlation of numbers, for regression and the similarity of sentences.
Both in [-1, 1].

Shape legend: N examples, R bootstrap draws, U distinct values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfscale.metrics.measure import Measure, paired


def correlation(predictions: Sequence[float], references: Sequence[float]) -> Measure:
    """Return ``pearson`` and ``spearman`` (ties share their mean rank); NaN where one side is
    constant.

    Raises:
        DataError: if there are no examples.
    """
    N = paired(predictions, references)
    x_N, y_N = np.asarray(predictions, dtype=float), np.asarray(references, dtype=float)
    return Measure(
        N,
        lambda w_RN: {
            "pearson": _pearson(x_N[None], y_N[None], w_RN),
            "spearman": _pearson(_ranks(x_N, w_RN), _ranks(y_N, w_RN), w_RN),
        },
    )


def _pearson(x_RN: np.ndarray, y_RN: np.ndarray, w_RN: np.ndarray) -> np.ndarray:
    total_R1 = w_RN.sum(1, keepdims=True)
    dx_RN = x_RN - (w_RN * x_RN).sum(1, keepdims=True) / total_R1
    dy_RN = y_RN - (w_RN * y_RN).sum(1, keepdims=True) / total_R1
    r_R: np.ndarray = (w_RN * dx_RN * dy_RN).sum(1) / np.sqrt(
        (w_RN * dx_RN**2).sum(1) * (w_RN * dy_RN**2).sum(1)
    )
    return r_R


def _ranks(x_N: np.ndarray, w_RN: np.ndarray) -> np.ndarray:
    """Return ``ranks_RN`` of a sample in which example n stands ``w_RN[r, n]`` times."""
    order_N = np.argsort(x_N, kind="stable")
    _, first_U, place_N = np.unique(x_N[order_N], return_index=True, return_inverse=True)
    times_RU = np.add.reduceat(w_RN[:, order_N], first_U, axis=1)
    ranks_RN = np.empty_like(w_RN)
    ranks_RN[:, order_N] = (np.cumsum(times_RU, 1) - (times_RU - 1) / 2)[:, place_N]
    return ranks_RN
