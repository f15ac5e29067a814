"""Accuracy, F1 and Matthews' correlation, of one label an example or of several. Scores are in [0,
1], MCC in [-1, 1].

They equal scikit-learn's, computed here from sums so that bootstrap draws cost nothing. Shape
legend: N examples, C labels, R draws. Source of the MCC of more than two labels: Gorodkin 2004,
Comparing two K-category assignments by a K-category correlation coefficient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hfscale.metrics.measure import Measure, Proportion, Scores, from_sums, paired, ratio


def f1(both: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return 2 PR / (P + R) from counts: of items both predicted and true, of predicted, of true. 0
    where there are none.
    """
    return ratio(2 * both, predicted + true)


def mean_f1(both_RC: np.ndarray, predicted_RC: np.ndarray, true_RC: np.ndarray) -> np.ndarray:
    """Return ``macro_R``: the mean F1 over the classes that are predicted or true at all."""
    return ratio(f1(both_RC, predicted_RC, true_RC).sum(1), (predicted_RC + true_RC > 0).sum(1))


def classification(
    predictions: Sequence[str] | Sequence[Sequence[str]],
    references: Sequence[str] | Sequence[Sequence[str]],
    *,
    labels: Sequence[str] = (),
) -> Measure:
    """Return ``accuracy``, ``f1_macro``, ``f1_micro``; with one label an example ``mcc``, and of
    two ``labels`` ``f1`` of the second.

    An example's label is a string, or a list of strings (multi-label; ``accuracy`` then asks for
    the exact set).

    Raises:
        DataError: if there are no examples.
    """
    N = paired(predictions, references)
    single = isinstance(references[0], str)
    pairs = [
        ([str(p)], [str(r)]) if single else (list(p), list(r))
        for p, r in zip(predictions, references, strict=True)
    ]
    names = [
        *labels,
        *sorted({label for pair in pairs for side in pair for label in side} - set(labels)),
    ]
    column, C = {name: k for k, name in enumerate(names)}, len(names)
    rows = np.zeros((N, 3 * C + 2))  # predicted, true, both; exactly right; 1
    for row, (predicted, true) in zip(rows, pairs, strict=True):
        row[[column[label] for label in predicted]] = 1
        row[[C + column[label] for label in true]] = 1
    rows[:, 2 * C : 3 * C] = rows[:, :C] * rows[:, C : 2 * C]
    rows[:, -2], rows[:, -1] = (rows[:, :C] == rows[:, C : 2 * C]).all(1), 1

    def finish(sums: np.ndarray) -> Scores:
        predicted, true, both = np.split(sums[:, :-2], 3, axis=1)
        scores = {
            "accuracy": sums[:, -2] / sums[:, -1],
            "f1_macro": mean_f1(both, predicted, true),
            "f1_micro": f1(both.sum(1), predicted.sum(1), true.sum(1)),
        }
        if single:
            n = sums[:, -1]
            spread = (n**2 - (predicted**2).sum(1)) * (n**2 - (true**2).sum(1))
            scores["mcc"] = ratio(both.sum(1) * n - (predicted * true).sum(1), np.sqrt(spread))
        return scores | (
            {"f1": f1(both[:, 1], predicted[:, 1], true[:, 1])} if single and C == 2 else {}
        )

    share = Proportion(float(rows[:, -2].sum()), N)
    shares = {"accuracy": share, **({"f1_micro": share} if single else {})}  # which are the same
    return replace(from_sums(rows, finish), proportions=shares)
