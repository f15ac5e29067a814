"""Exact match and F1 of answers, in percent: SQuAD 1.1 and 2.0, by words; by characters where a
text is Chinese or Japanese.

Equal to the official script of SQuAD 2.0, and on Chinese to MLQA's. (Of 1.1's script it differs
where an answer has no word but "the": there 2.0's rule holds, equal or not.) Sources: Rajpurkar et
al. 2018, Know what you don't know; Lewis et al. 2020, MLQA, sec. 4.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hfscale.metrics.measure import Measure, Proportion, Scores, from_sums, paired

# kana, Han
_BY_CHARACTER = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def answer_tokens(text: str) -> list[str]:
    """Return what is compared of an answer: words, or characters of Chinese and Japanese; no case,
    punctuation or article.
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    if not _BY_CHARACTER.search(text):
        return re.sub(r"\b(a|an|the)\b", " ", text).split()
    unmarked = "".join(c for c in text if unicodedata.category(c)[0] != "P")
    return _BY_CHARACTER.sub(r" \g<0> ", unmarked).split()


def answer_f1(predicted: list[str], true: list[str]) -> float:
    """Return the F1 of the tokens two answers share; of an empty answer, whether both are."""
    if not predicted or not true:
        return float(predicted == true)
    return 2 * (Counter(predicted) & Counter(true)).total() / (len(predicted) + len(true))


def squad(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    no_answer: Sequence[float] | None = None,
    threshold: float = 0.0,
) -> Measure:
    """Return ``exact_match`` and ``f1``; of the best of several true answers; no true answer: the
    right prediction is "".

    With questions of both kinds also their parts, ``has_answer_exact_match``, ``has_answer_f1``,
    ``no_answer_accuracy``.

    Args:
        no_answer: how much "no answer" is preferred to each prediction; above ``threshold`` it
            counts as "".

    Raises:
        DataError: if there are no examples.
    """
    paired(predictions, references)
    if no_answer is not None:
        predictions = [
            "" if score > threshold else text
            for text, score in zip(predictions, no_answer, strict=True)
        ]
    exact_N, f1_N = np.array(_raw_scores(predictions, references), dtype=float).T
    has_N = np.array([any(map(answer_tokens, answers)) for answers in references], dtype=float)
    both = {*has_N} == {0.0, 1.0}
    of_has = [has_N, exact_N * has_N, f1_N * has_N]
    rows = np.array([exact_N, f1_N, *of_has, exact_N * (1 - has_N), np.ones_like(has_N)]).T

    def finish(sums: np.ndarray) -> Scores:
        exact, f1, has, has_exact, has_f1, none_exact, n = sums.T
        scores = {"exact_match": exact / n, "f1": f1 / n}
        if both:
            scores["has_answer_exact_match"] = has_exact / has
            scores["has_answer_f1"] = has_f1 / has
            scores["no_answer_accuracy"] = none_exact / (n - has)
        return {name: 100 * score for name, score in scores.items()}

    exact, _, has, has_exact, _, none_exact, n = rows.sum(axis=0)
    shares = {"exact_match": Proportion(exact, n, scale=100)}
    if both:
        shares["has_answer_exact_match"] = Proportion(has_exact, has, scale=100)
        shares["no_answer_accuracy"] = Proportion(none_exact, n - has, scale=100)
    return replace(from_sums(rows, finish), proportions=shares)


def best_threshold(
    predictions: Sequence[str], references: Sequence[Sequence[str]], no_answer: Sequence[float]
) -> dict[str, float]:
    """Return ``best_f1`` and the ``best_f1_threshold`` of ``no_answer`` that gives it. Choose it on
    validation data.
    """
    f1_N = np.array([f1 for _, f1 in _raw_scores(predictions, references)])
    has_N = np.array([any(map(answer_tokens, answers)) for answers in references])
    answers_N = np.array([bool(text) for text in predictions], dtype=float)
    gain_N = np.where(has_N, f1_N, -answers_N)  # of answering, against saying nothing
    order = np.argsort(no_answer, kind="stable")
    silent = (~has_N).sum()
    totals = silent + np.cumsum([0.0, *gain_N[order]])
    best = int(np.argmax(totals))
    threshold = no_answer[order[best - 1]] if best else min(0.0, min(no_answer) - 1)
    return {
        "best_f1": 100 * float(totals[best]) / len(references),
        "best_f1_threshold": float(threshold),
    }


def _raw_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[tuple[bool, float]]:
    scores = []
    for prediction, answers in zip(predictions, references, strict=True):
        predicted = answer_tokens(prediction)
        true = list(filter(None, map(answer_tokens, answers))) or [[]]
        scores.append((predicted in true, max(answer_f1(predicted, tokens) for tokens in true)))
    return scores
