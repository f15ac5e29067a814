"""Entities in tags, and their F1: as seqeval's default mode, which is conlleval's. Scores are in [0, 1].

seqeval itself is not asked: its package no longer installs with today's setuptools, and the bootstrap needs counts a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfscale.metrics.classification import f1, mean_f1
from hfscale.metrics.measure import Measure, Scores, from_sums, paired, ratio


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (type, first, one past the last) of each entity in ``O``, ``B-TYPE``, ``I-TYPE`` tags; an ``I-`` may begin one."""
    found: list[tuple[str, int, int]] = []
    before = "O"
    for place, tag in enumerate(tags):
        if tag != "O":
            goes_on = tag[0] in "IE" and before[0] in "BI" and before[1:] == tag[1:]
            first = found.pop()[1] if goes_on else place
            found.append((tag[2:] or "_", first, place + 1))
        before = tag
    return found


def entity_f1(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Measure:
    """Return ``f1``, ``precision``, ``recall`` (micro), ``f1_macro`` over types, and the ``accuracy`` of tags. An example is a sentence.

    Raises:
        DataError: if there are no sentences.
    """
    paired(predictions, references)
    found = [
        (set(entities(p)), set(entities(r))) for p, r in zip(predictions, references, strict=True)
    ]
    types = sorted({entity[0] for pair in found for side in pair for entity in side})

    def counts(side: set[tuple[str, int, int]]) -> list[int]:
        names = [entity[0] for entity in side]
        return [names.count(name) for name in types]

    rows = [
        [*counts(p & r), *counts(p), *counts(r), sum(map(str.__eq__, tags, true)), len(true)]
        for (p, r), tags, true in zip(found, predictions, references, strict=True)
    ]

    def finish(sums: np.ndarray) -> Scores:
        by_type = np.split(sums[:, :-2], 3, axis=1)
        both, predicted, true = (part.sum(1) for part in by_type)
        return {
            "f1": f1(both, predicted, true),
            "precision": ratio(both, predicted),
            "recall": ratio(both, true),
            "f1_macro": mean_f1(*by_type),
            "accuracy": ratio(sums[:, -2], sums[:, -1]),
        }

    return from_sums(rows, finish)
