"""What is out of the ordinary, by the values before it."""

from __future__ import annotations

import math
import random

from hfscale.monitor.scores import Window


def noisy(steps: int, *, level: float = 3.0, noise: float = 0.03, fall: float = 0.0) -> list[float]:
    draw = random.Random(5)
    return [level * math.exp(-fall * n) + draw.gauss(0.0, noise) for n in range(steps)]


def filled(values: list[float], **how: float) -> Window:
    window = Window(128, floor=how.get("floor", 0.001))
    for step, value in enumerate(values, start=1):
        assert window.score(value) < 8, f"a false alarm at step {step}"
        window.add(step, value, most=8)
    return window


def test_a_spike_is_measured_by_the_noise_before_it() -> None:
    window = filled(noisy(200))
    assert 25 < window.score(4.0) < 45, "1.0 is 33 deviations of 0.03"
    assert window.score(3.05) < 3


def test_a_loss_that_falls_is_its_own_measure() -> None:
    window = filled(noisy(300, level=6.0, fall=0.004))
    level = window.level()
    assert level is not None and 1.7 < level < 2.0
    assert window.score(level + 1) > 15, "though the whole window lies above it"


def test_the_first_steps_are_no_measure_and_noise_below_the_floor_is_ordinary() -> None:
    assert filled(noisy(60)).score(1e9) == 0.0
    still = filled([2.0] * 100, floor=0.02)
    assert round(still.score(2.4)) == 10, "deviations of 2 %"


def test_a_spike_hides_no_other_but_a_new_level_becomes_ordinary() -> None:
    window = filled(noisy(200))
    before = window.score(5.0)
    window.add(201, 5.0, most=8)
    assert window.score(5.0) > 0.8 * before
    for step in range(202, 320):
        window.add(step, 5.0, most=8)
    assert window.score(5.0) < 8


def test_norms_are_compared_by_their_ratio() -> None:
    window = Window(128, floor=0.1, logarithmic=True)
    for step in range(100):
        window.add(step, 1e-3 * (1 + step % 3 / 10), most=8)
    assert 15 < window.score(1e-2) < 20
    assert window.score(0.0) == -math.inf
    window.add(100, 0.0, most=8)
    assert window.score(1e-2) > 15, "a norm of zero is no measure"


def test_it_goes_back_and_is_kept_as_numbers() -> None:
    values = noisy(150)
    window = filled(values)
    earlier = filled(values[:100])
    window.forget(101)
    assert window.state() == earlier.state()[-len(window.state()) :]
    again = Window(128, floor=0.001)
    again.load(earlier.state())
    assert again.score(4.0) == earlier.score(4.0)
