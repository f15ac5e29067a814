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
    sides = [_label_sets(side, single=single) for side in (predictions, references)]
    unnamed = set().union(*sides[0], *sides[1]) - set(labels)
    names = [*labels, *sorted(unnamed)]
    C = len(names)
    predicted_NC, true_NC = (_indicators(side, names) for side in sides)
    right_N = (predicted_NC == true_NC).all(1)
    rows_NK = np.c_[predicted_NC, true_NC, predicted_NC * true_NC, right_N, np.ones(N)]

    def finish(sums_RK: np.ndarray) -> Scores:
        predicted_RC, true_RC, both_RC = np.split(sums_RK[:, :-2], 3, axis=1)
        right_R, n_R = sums_RK[:, -2], sums_RK[:, -1]
        scores = {
            "accuracy": right_R / n_R,
            "f1_macro": mean_f1(both_RC, predicted_RC, true_RC),
            "f1_micro": f1(both_RC.sum(1), predicted_RC.sum(1), true_RC.sum(1)),
        }
        if single:
            scores["mcc"] = _mcc(both_RC, predicted_RC, true_RC, n_R)
        if single and C == 2:
            scores["f1"] = f1(both_RC[:, 1], predicted_RC[:, 1], true_RC[:, 1])
        return scores

    share = Proportion(float(right_N.sum()), N)
    shares = {"accuracy": share}
    if single:  # where it is the same
        shares["f1_micro"] = share
    return replace(from_sums(rows_NK, finish), proportions=shares)


def _label_sets(side: Sequence[str] | Sequence[Sequence[str]], *, single: bool) -> list[list[str]]:
    """Return the labels of each example."""
    return [[str(labels)] if single else list(labels) for labels in side]


def _indicators(label_sets: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
    """Return ``is_NC``: 1 where example n has label ``names[c]``."""
    column = {name: c for c, name in enumerate(names)}
    is_NC = np.zeros((len(label_sets), len(names)))
    for n, labels in enumerate(label_sets):
        is_NC[n, [column[label] for label in labels]] = 1
    return is_NC


def _mcc(
    both_RC: np.ndarray, predicted_RC: np.ndarray, true_RC: np.ndarray, n_R: np.ndarray
) -> np.ndarray:
    """Return Matthews' correlation of each draw of ``n_R`` examples; 0 where it is undefined."""
    spread_R = (n_R**2 - (predicted_RC**2).sum(1)) * (n_R**2 - (true_RC**2).sum(1))
    agreement_R = both_RC.sum(1) * n_R - (predicted_RC * true_RC).sum(1)
    return ratio(agreement_R, np.sqrt(spread_R))
