"""What trials come to: bisection, turns, and what a test of learning rates says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hfscale.tuning.rates import Rising, draw, find, smoothed
from hfscale.tuning.search import Speed, divisors, faster, in_turns, largest, steady
from launch.tuning import config_lines


@pytest.mark.parametrize("most", range(8))
def test_the_largest_that_fits_is_found_in_few_trials(most: int):
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most

    sizes = divisors(12)
    assert sizes == [1, 2, 3, 4, 6, 12]
    assert largest(sizes, fits) == max((size for size in sizes if size <= most), default=None)
    assert len(tried) <= 3
    assert len(tried) == len(set(tried))


def test_candidates_are_measured_in_turns_and_one_that_fails_is_left_out():
    order: list[str] = []

    def measure(name: str) -> float | str:
        order.append(name)
        return "no compiler" if name == "b" else 100.0 + len(order)

    speeds = in_turns(["a", "b", "c"], measure)
    assert order == ["a", "b", "c", "a", "c"]
    assert speeds["a"].turns == [101.0, 104.0]
    assert str(speeds["b"]) == "does not run: no compiler"
    assert str(speeds["c"]) == "104 tokens/s (103 to 105 in 2 turns)"


def test_what_is_within_the_spread_is_no_gain():
    now, close, clear = Speed([100.0, 110.0]), Speed([105.0, 130.0]), Speed([111.0, 112.0])
    assert faster({"now": now, "close": close}, now="now") == "now"
    assert faster({"now": now, "clear": clear}, now="now") == "clear"
    assert faster({"now": now, "broken": Speed(problem="x")}, now="now") == "now"


def test_the_first_steps_are_no_speed():
    assert steady([1.0, 2.0, 100.0, 102.0, 104.0]) == 102.0
    assert steady([1.0, 2.0]) == 2.0


# --------------------------------------------------------------------------------- learning rates
RISING = Rising(1e-5, 1e1, steps=61)
RATES = [RISING.rate(step) for step in range(1, 62)]


def test_rates_rise_by_a_constant_factor():
    assert RATES[0] == pytest.approx(1e-5)
    assert RATES[-1] == pytest.approx(1e1)
    assert RATES[31] / RATES[30] == pytest.approx(10**0.1)


def valley(rate: float) -> float:
    """A loss that falls around 1e-2 and is beyond all bounds from 1 on."""
    fall = 3 / (1 + (1e-2 / rate) ** 2)
    return 6 - fall + max(0.0, rate) ** 2


def test_the_rate_that_teaches_most_is_suggested_and_what_diverges_is_seen():
    losses: list[float] = []
    for rate in RATES:
        losses.append(valley(rate))
        if RISING.diverged(losses):
            break
    found = find(RATES[: len(losses)], losses, diverged=True)
    assert found.diverged is not None
    assert 0.5 < found.diverged < 3
    assert found.steepest is not None
    assert 5e-3 < found.steepest < 5e-2, "smoothing comes late by a step or two"
    assert found.suggested == found.steepest
    assert found.lowest > found.steepest


def test_what_is_suggested_keeps_its_distance_from_what_diverges():
    losses = [6.0 - 0.01 * step for step in range(30)]
    found = find(RATES[:30], [*losses[:-1], 60.0], diverged=True)
    assert found.suggested is not None
    assert found.suggested <= RATES[29] / 10


def test_numbers_that_are_none_diverge_and_a_flat_loss_suggests_nothing(tmp_path: Path):
    assert RISING.diverged([6.0, math.nan])
    assert not RISING.diverged([6.0] * 20)
    flat = find(RATES, [6.0] * 61, diverged=False)
    assert (flat.suggested, flat.diverged) == (None, None)
    assert find(RATES[:2], [6.0, math.nan], diverged=True).suggested is None
    draw(RATES, [valley(rate) for rate in RATES], flat, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_average_has_no_bias():
    assert smoothed([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])


def test_lines_for_the_config_are_sections_of_yaml():
    chosen = {"train.micro_batch": 4, "engine.compile": True, "engine.zero_stage": 1}
    assert config_lines(chosen) == [
        "train: {micro_batch: 4}",
        "engine: {compile: true, zero_stage: 1}",
    ]
