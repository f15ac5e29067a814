from __future__ import annotations

import pytest

from hfscale.config.schema import Best
from hfscale.dist.agree import Agreed
from hfscale.engine.engine import StepStats
from hfscale.errors import ConfigError
from hfscale.training.observers.base import Step
from hfscale.training.observers.best import KeepBest


def step(number: int, **figures: float) -> Step:
    agreed = Agreed({}, stop=False, due=False, failed=False, save=False, end=False, digest=0)
    stats = StepStats(1.0, 1.0)
    return Step(number, True, agreed, stats, 0, 0, figures and {"step": number, **figures})


def saves(keep: KeepBest, values: list[float], name: str = "validation_loss") -> list[bool]:
    asked = []
    for number, value in enumerate(values, 1):
        keep.look(step(number, **{name: value}))
        asked.append(keep.save)
    return asked


def test_what_improves() -> None:
    keep = KeepBest(Best())
    losses = [float("nan"), 3.0, 3.0, 2.5, 2.6, 2.4]
    assert saves(keep, losses) == [False, True, False, True, False, True]
    keep.look(step(7, loss=0.1))
    assert not keep.save, "not validated"
    with pytest.raises(ConfigError, match=r"keep_best(.|\n)*validation_perplexity"):
        keep.look(step(8, validation_perplexity=3.0))
    scores = KeepBest(Best(metric="validation_f1"))
    assert saves(scores, [0.1, 0.3, 0.2], "validation_f1") == [True, True, False]


def test_patience_counts_validations_alone_and_goes_on_counting_in_a_resume() -> None:
    keep = KeepBest(Best(), patience=3)
    saves(keep, [1.0, 2.0])
    keep.look(step(3))
    saves(keep, [2.0])
    assert keep.stop == ""
    assert keep.state()["best"].as_dict() == {
        "metric": "validation_loss",
        "step": 1,
        "value": 1.0,
        "stale": 2,
    }
    resumed = KeepBest(Best(), patience=3, saved=keep.state()["best"])
    saves(resumed, [1.5])
    assert "3 validations" in resumed.stop
    assert KeepBest(Best(), patience=3, saved=resumed.state()["best"]).stop, "it stays ended"
