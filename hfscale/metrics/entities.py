"""Entities in tags, and their F1: as seqeval's default mode, which is conlleval's. Scores are in
[0, 1].

Tags of other schemes are made ``B I E S O`` before anything: BMES, BILOU and BMEWO have other
letters for the same places. seqeval itself is not asked: the bootstrap needs counts a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from hfscale.errors import DataError
from hfscale.metrics.classification import f1, mean_f1
from hfscale.metrics.measure import Measure, Scores, from_sums, paired, ratio

OUTSIDE = "O"
PLACES = {  # in an entity: begin, inside, end, or all of it
    **{letter: letter for letter in "BIES"},
    **{"M": "I", "L": "E", "U": "S", "W": "S"},  # middle, last, unit, whole
}
_TAG = re.compile(r"([A-Za-z])(?:[-_](.+))?")  # a place, and a type unless all are of one
_BEHIND = re.compile(r".+[-_][BI]")  # PER-B


def parts_entities(labels: Iterable[str]) -> bool:
    """Return whether tags of this set part texts into entities; False: they are parts of speech, or
    the like.

    Raises:
        DataError: if they do, but in no scheme that is known here: what is an entity would be a
            guess.
    """
    tags = sorted({*labels} - {OUTSIDE})
    if {"B", "I"} & {*tags} and PLACES.keys() >= {*tags}:
        return True
    typed = [tag for tag in tags if len(tag) > 1 and _TAG.fullmatch(tag)]
    alike = [tag for tag in tags if _BEHIND.fullmatch(tag) or (tag in typed and tag[0] in "BIbi")]
    if not alike and not (typed and typed == tags and OUTSIDE in {*labels}):
        return False
    known = [tag for tag in tags if tag[0] in PLACES and _TAG.fullmatch(tag)]
    if strange := sorted({*tags} - {*known}):
        raise DataError(
            "these tags are of no scheme that is known, so nobody can say what an entity is",
            where="tags",
            value=strange[:5],
            remedy="write them as O and B-TYPE, I-TYPE (or as BIOES, BMES, BILOU), or bare B, I, O",
        )
    return True


def placed(tag: str) -> str:
    """Return a tag of any known scheme as ``O``, or ``B-TYPE`` with B, I, E or S.

    Raises:
        DataError: if it is of none.
    """
    if tag == OUTSIDE:
        return tag
    if (match := _TAG.fullmatch(tag)) is None or match[1] not in PLACES:
        raise DataError(
            "a tag is of no scheme that is known",
            where="tags",
            value=tag,
            remedy="write it as O, B-TYPE or I-TYPE",
        )
    return f"{PLACES[match[1]]}-{match[2] or '_'}"


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (type, first, one past the last) of each entity in tags of a known scheme; an ``I-``
    may begin one.

    Raises:
        DataError: as ``placed``.
    """
    spans: list[tuple[str, int, int]] = []
    before = OUTSIDE
    for at, tag in enumerate(map(placed, tags)):
        if tag != OUTSIDE:
            goes_on = tag[0] in "IE" and before[0] in "BI" and before[1:] == tag[1:]
            first = spans.pop()[1] if goes_on else at
            spans.append((tag[2:], first, at + 1))
        before = tag
    return spans


def entity_f1(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Measure:
    """Return ``f1``, ``precision``, ``recall`` (micro), ``f1_macro`` over types, and the
    ``accuracy`` of tags. An example is a sentence.

    Raises:
        DataError: if there are no sentences.
    """
    paired(predictions, references)
    predicted = [set(entities(tags)) for tags in predictions]
    true = [set(entities(tags)) for tags in references]
    types = sorted({kind for kind, _, _ in set().union(*predicted, *true)})

    def counts(spans: set[tuple[str, int, int]]) -> list[int]:
        kinds = [kind for kind, _, _ in spans]
        return [kinds.count(kind) for kind in types]

    rows = []
    for p, r, tags, answers in zip(predicted, true, predictions, references, strict=True):
        alike = sum(map(str.__eq__, tags, answers))
        rows.append([*counts(p & r), *counts(p), *counts(r), alike, len(answers)])

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


def tag_accuracy(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> Measure:
    """Return the ``accuracy`` of tags that part no entities. An example is a sentence.

    Raises:
        DataError: if there are no sentences.
    """
    paired(predictions, references)
    pairs = zip(predictions, references, strict=True)
    rows = [[sum(map(str.__eq__, tags, true)), len(true)] for tags, true in pairs]
    return from_sums(rows, lambda sums: {"accuracy": ratio(sums[:, 0], sums[:, 1])})
