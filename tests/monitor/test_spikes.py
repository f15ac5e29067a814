"""A gradient norm that is far above the usual is said once, where it happens."""

from __future__ import annotations

import math

from hfscale.monitor.spikes import QUIET_STEPS, Spikes


def test_a_spike_is_said_with_its_step_and_how_far_it_is_above_the_median() -> None:
    spikes = Spikes()
    assert [spikes.look(step, 2.0 + step % 3 / 10) for step in range(1, 31)] == [None] * 30
    notice = spikes.look(31, 183.6)
    assert notice is not None and "183.6 at step 31 is 87 times the median" in notice
    assert spikes.look(32, 2.0) is None
    assert spikes.look(33, 200.0) is None, "said a moment ago"
    assert spikes.look(31 + QUIET_STEPS, 200.0) is not None, "the spike itself moves no median"


def test_the_first_steps_of_a_run_are_no_measure() -> None:
    spikes = Spikes()
    assert spikes.look(1, 1.0) is None
    assert spikes.look(2, 500.0) is None


def test_an_overflow_of_fp16_is_no_spike() -> None:
    spikes = Spikes()
    for step in range(40):
        spikes.look(step, 1.0)
    assert spikes.look(40, math.inf) is None
