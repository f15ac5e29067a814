"""The bootstrap: seeded, of the right width, and equal to drawing examples and scoring them
anew.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from hfscale.errors import DataError
from hfscale.metrics.classification import classification
from hfscale.metrics.correlation import correlation
from hfscale.metrics.measure import Measure, mean
from hfscale.metrics.squad import squad
from hfscale.metrics.translation import translation

RNG = random.Random(5)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "lay", "under", "old", "tree"]
TEXTS = [" ".join(RNG.choices(WORDS, k=9)) for _ in range(40)]
GUESSES = [
    " ".join(word if RNG.random() < 0.7 else RNG.choice(WORDS) for word in text.split())
    for text in TEXTS
]
X = [RNG.randint(0, 6) for _ in range(40)]
Y = [x + RNG.randint(0, 4) for x in X]
LABELS = [RNG.choice("abc") for _ in range(40)]
GUESSED = [label if RNG.random() < 0.6 else RNG.choice("abc") for label in LABELS]


@pytest.mark.parametrize(
    ("metric", "predictions", "references"),
    [(translation, GUESSES, TEXTS), (correlation, X, Y), (classification, GUESSED, LABELS)],
)
def test_a_draw_is_scored_as_if_its_examples_were_the_data(metric, predictions, references):
    drawn = [RNG.randrange(40) for _ in range(40)]
    weights = np.bincount(drawn, minlength=40)[None].astype(float)
    again = metric([predictions[n] for n in drawn], [references[n] for n in drawn]).scores()
    for name, score in metric(predictions, references).of(weights).items():
        assert score[0] == pytest.approx(again[name], abs=1e-9), name


def test_intervals_are_those_of_theory_and_seeded():
    measure = mean({"accuracy": [n % 5 == 0 for n in range(1000)]})
    low, high = measure.intervals(seed=3)["accuracy"]
    half = 1.96 * (0.2 * 0.8 / 1000) ** 0.5  # normal approximation of the binomial
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.004)
    assert measure.intervals(seed=3) == {"accuracy": (low, high)} != measure.intervals(seed=4)
    narrow = measure.intervals(seed=3, confidence=0.5)["accuracy"]
    assert low < narrow[0] < 0.2 < narrow[1] < high


def test_five_of_five_are_not_all():
    """Wilson by hand: 5 / (5 + 1.96 ** 2) = 0.5655; no draw moves the other scores, so there is no
    interval.
    """
    found = classification(["a", "b", "a", "b", "a"], ["a", "b", "a", "b", "a"]).intervals()
    assert found["accuracy"] == found["f1_micro"] == pytest.approx((0.5655, 1.0), abs=1e-4)
    assert np.isnan(found["f1_macro"]).all()
    none = mean({"accuracy": [0, 0, 0]}, proportions=["accuracy"]).intervals()["accuracy"]
    assert none == pytest.approx((0.0, 0.5615), abs=1e-4)
    exact = squad(["x", "y"], [["x"], ["z"]]).intervals()["exact_match"]
    assert exact == pytest.approx((9.45, 90.55), abs=0.01), "in percent"


def test_draws_in_parts_are_draws(monkeypatch):
    measure = mean({"x": [float(n) for n in range(30)]})
    whole = measure.intervals(seed=1)
    monkeypatch.setattr("hfscale.metrics.measure.NUMBERS_IN_FLIGHT", 100)
    assert measure.intervals(seed=1) == whole


def test_two_measures_of_the_same_examples_are_one():
    both = mean({"a": [0.0, 1.0]}) | Measure(2, lambda w: {"n": w.sum(1)}, {"note": "x"})
    assert both.scores() == {"a": 0.5, "n": 2.0}
    assert both.notes == {"note": "x"}


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_nothing_to_score(predictions, references):
    with pytest.raises(DataError, match="one prediction for each"):
        classification(predictions, references)
