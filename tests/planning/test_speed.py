"""How long a step takes, against numbers done by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hfscale.models.devices import CPU, device_named
from hfscale.planning.memory import Setup
from hfscale.planning.parameters import Weights
from hfscale.planning.site import ARITHMETIC, TOUCHED, TRAFFIC, WIRE, Site
from hfscale.planning.speed import GAP_S, OPERATOR_S, PASSES, ZERO_PASSES, Speed, speed
from hfscale.planning.tracing import Trace

P = 10_000_000
WEIGHTS = Weights(
    trained=P,
    frozen=0,
    tensors=10,
    largest=P,
    persistent=0,
    buffer_bytes=0,
    parts={},
    adapted=False,
)
SETUP = Setup(
    stage=1,
    precision="bf16",
    offload="none",
    checkpointing=False,
    micro_batch=2,
    accumulation=3,
    ranks=4,
    a_node=4,
)
# a product, and an operator that reads and writes a gigabyte
WORK = [(1e12, 1e6), (0.0, 1e9)]


class OneStep:
    how = "by hand"

    def of(self, figure: Callable[[Trace], float]) -> float:
        return figure(Trace(work=list(WORK)))


def planned(setup: Setup, site: Site) -> Speed:
    return speed(
        setup,
        WEIGHTS,
        OneStep(),
        site=site,
        seq_len=128,
        flops_per_token=6.0 * P,
        compiled=False,
    )


def parts(one: Speed) -> dict[str, float]:
    return {part.name: part.value for part in one.parts}


def test_a_step_of_gpus_by_hand():
    h100 = device_named("h100")
    seen = planned(SETUP, Site(h100, 4, 4, None, 80e9))
    product = 1e12 / (ARITHMETIC * 989e12) + GAP_S
    traffic = 1e9 / (TRAFFIC * 3350e9) + GAP_S
    assert parts(seen)["compute"] == pytest.approx(3 * (product + traffic))
    sent = (4 + 2) * P * 3 / 4
    wire = sent / (WIRE * 450e9)
    assert parts(seen)["communication"] == pytest.approx(wire, abs=3e-4)  # and some latency
    assert seen.tokens == 2 * 3 * 4 * 128
    rate = seen.tokens / seen.step.value
    assert seen.mfu.value == pytest.approx(rate * 6 * P / (4 * 989e12))


def test_of_micro_batches_stage_2_sends_each():
    site = Site(device_named("h100"), 4, 4, None, 80e9)
    first, second = (parts(planned(SETUP.at(stage), site))["communication"] for stage in (1, 2))
    assert second > 2 * first


def test_a_step_of_cores_by_hand():
    """Both kinds of work are added up, nothing hides, and gradients are passed over."""
    site = Site(CPU, 4, 4, None, 8e9)
    setup = replace(SETUP, on_cpu=True)
    seen = parts(planned(setup, site))
    one = 1e12 / (ARITHMETIC * CPU.flops_16) + 1e9 / (TOUCHED * CPU.memory_speed)
    assert seen["compute"] == pytest.approx(3 * (one + 2 * OPERATOR_S))
    passed = 4 * P / (TOUCHED * CPU.memory_speed)
    assert seen["gradients"] == pytest.approx(ZERO_PASSES * passed)
    each = parts(planned(setup.at(2), site))["gradients"]
    assert each == pytest.approx(3 * ZERO_PASSES * passed)
    whole = parts(planned(replace(setup, stage=0, precision="fp32"), site))["gradients"]
    assert whole == pytest.approx(PASSES * passed)
