"""Averages are over the steps alone, never over what happens between them."""

from hfscale.monitor.throughput import Throughput


def test_only_steps_are_timed():
    now = [0.0]
    throughput = Throughput(flops_per_token=6.0, peak_flops=1200.0, clock=lambda: now[0])
    for _ in range(2):
        with throughput.step():
            with throughput.waiting():
                now[0] += 0.5
            now[0] += 1.5
            throughput.count(100)
        now[0] += 60.0  # validation, a checkpoint
    assert throughput.report() == {
        "step_s": 2.0,
        "data_wait_s": 0.5,
        "tokens_per_s": 50.0,
        "mfu": 0.25,
    }
    with throughput.step():
        now[0] += 1.0
    assert throughput.report()["step_s"] == 1.0


def test_mfu_is_unknown_without_a_peak():
    assert Throughput(flops_per_token=6.0, peak_flops=None).report()["mfu"] is None
