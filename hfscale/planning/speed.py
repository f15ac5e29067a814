"""How long a step takes, by a roofline: each operator takes as long as its arithmetic or its memory
traffic, whichever is longer; then come what ranks send each other, and the optimizer.

    step = accumulation x micro-batch + communication + update (+ gradients, on a CPU)

A micro-batch is the sum over the operators of its trace. Bytes that the ranks exchange, a rank and
step (W ranks, b bytes a weight; a reduction is in fp32 whatever the precision):

    stage 0    8 P (W - 1) / W                          gradients, all-reduced
    stage 1    (4 + b) P (W - 1) / W                    gradients to their owners, weights back
    stage 2    (4 A + b) P (W - 1) / W                  gradients of each of A micro-batches
    stage 3    (4 + 2 b) A P (W - 1) / W                weights gathered twice a micro-batch

Below stage 3 nothing of it hides behind the backward pass: hfscale reduces once a step, where the
sum is exact. Stage 3 fetches weights while it computes. On a CPU products and everything else are
added up: both are work of the same core, and new tensors cost it more than their bytes. Source:
Williams et al. 2009 (roofline), Rajbhandari et al. 2020 (ZeRO, sec. 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hfscale.planning.figures import Figure, count, total
from hfscale.planning.memory import FP32, Setup
from hfscale.planning.parameters import Weights
from hfscale.planning.site import BUS_SPEED, Rate, Site
from hfscale.planning.tracing import Step, Work

# of one exchange however small: NCCL's and gloo's (assumed)
LATENCY_S, GLOO_LATENCY_S = 3e-5, 6e-4
GAP_S = 3e-6  # of each operator of a GPU: its start and its tail (assumed)
OPERATOR_S = 2.8e-5  # of each of a CPU: Python and autograd (by a fit to benchmarks/plan.py)
# over gradients, on a CPU, without ZeRO and with it (by a fit to benchmarks/plan.py)
PASSES, ZERO_PASSES = 8, 17
GATHER_PASSES = 3  # over the weights that stage 3 gathers
FUSED = 0.4  # of the traffic of operators without products, where torch.compile fuses them
HOST_SPEED = 100e9  # bytes a second, of a node's memory: AdamW on offloaded states


@dataclass(frozen=True)
class Speed:
    """A step of all ranks. Seconds, tokens of the whole step, and flops a token as the MFU has."""

    parts: tuple[Figure, ...]
    tokens: float
    flops_per_token: float
    peak_flops: float  # of all ranks

    @property
    def step(self) -> Figure:
        """How long a step takes."""
        return total("step", self.parts)

    @property
    def tokens_per_s(self) -> Figure:
        """How fast the run reads."""
        value = self.tokens / self.step.value
        how = f"{count(self.tokens)} tokens a step / {self.step.value:.4g} s"
        return Figure("speed", value, "tokens/s", how)

    @property
    def mfu(self) -> Figure:
        """What part of the peak goes into the model itself."""
        rate = self.tokens_per_s.value * self.flops_per_token
        how = (
            f"{count(self.flops_per_token)} flops a token x {count(self.tokens_per_s.value)} "
            f"tokens/s / {count(self.peak_flops)} flop/s"
        )
        return Figure("MFU", rate / self.peak_flops, "%", how)


def compute_s(work: Sequence[Work], site: Site, setup: Setup, *, compiled: bool) -> float:
    """Return how long the operators of a micro-batch take."""
    peak, traffic = site.flops(setup.precision).speed, site.traffic.speed
    if setup.on_cpu:  # products go through its cache
        seconds = sum(flops / peak if flops else moved / traffic for flops, moved in work)
        return seconds + OPERATOR_S * len(work)
    gap, seconds = GAP_S, 0.0
    for flops, moved in work:
        if compiled and not flops:
            seconds += FUSED * (moved / traffic + gap)
        else:
            seconds += max(flops / peak, moved / traffic) + gap
    return seconds


def speed(
    setup: Setup,
    weights: Weights,
    step: Step,
    *,
    site: Site,
    seq_len: int,
    flops_per_token: float,
    compiled: bool,
) -> Speed:
    """Return how long a step takes."""
    seconds = step.of(lambda one: compute_s(one.work, site, setup, compiled=compiled))
    flops = step.of(lambda one: sum(work[0] for work in one.work))
    how = (
        f"{setup.accumulation} micro-batches of {setup.micro_batch} x {seconds:.4g} s: each "
        f"operator at {site.flops(setup.precision).how} or {site.traffic.how}; "
        f"{count(flops)} flops"
    )
    compute = Figure("compute", setup.accumulation * seconds, "s", how)
    parts = [
        compute,
        *_handling(setup, weights, site),
        *_exchange(setup, weights, compute.value, site.exchange),
    ]
    parts.append(_update(setup, weights, site))
    tokens = setup.micro_batch * setup.accumulation * setup.ranks * seq_len
    peak = site.device.flops_32 if setup.on_cpu else site.device.flops_16
    return Speed(
        tuple(one for one in parts if one.value), tokens, flops_per_token, setup.ranks * peak
    )


def _handling(setup: Setup, weights: Weights, site: Site) -> list[Figure]:
    """Return what ranks on cores do to gradients and gathered weights beside sending them."""
    if not setup.on_cpu:
        return []
    times = setup.accumulation if setup.stage >= 2 else 1
    passes = ZERO_PASSES if setup.stage else PASSES
    moved = passes * FP32 * times * weights.trained
    how = (
        f"{count(weights.trained)} x {FP32} bytes x {times} x {passes} passes (laid end to end, "
        f"cast, summed, normed; seen on CPU ranks) at {site.traffic.how}"
    )
    handled = [Figure("gradients", moved / site.traffic.speed, "s", how)]
    if setup.stage == 3:
        whole = 2 * setup.accumulation * setup.bytes * (weights.trained + weights.frozen)
        how = (
            f"{count(whole)} bytes of weights, gathered twice a micro-batch and moved "
            f"{GATHER_PASSES} times (seen on CPU ranks) at {site.traffic.how}"
        )
        handled.append(Figure("gathering", GATHER_PASSES * whole / site.traffic.speed, "s", how))
    return handled


def _exchange(setup: Setup, weights: Weights, compute: float, over: Rate) -> list[Figure]:
    ranks, stage, b = setup.ranks, setup.stage, setup.bytes
    if ranks == 1:
        return []
    others, trained = (ranks - 1) / ranks, weights.trained
    times = setup.accumulation if stage >= 2 else 1
    gradients = (2 if stage == 0 else 1) * FP32 * times * trained * others
    gathered = b * trained * others
    if stage == 3:
        gathered = 2 * times * b * (trained + weights.frozen) * others
    sent = gradients + (gathered if stage else 0.0)
    latency = GLOO_LATENCY_S if setup.on_cpu else LATENCY_S
    exchanges = _exchanges(setup, weights)
    how = (
        f"{count(sent)} bytes a rank and step (stage {stage}) / {over.speed / 1e9:.4g} GB/s: "
        f"{over.how}; {count(exchanges)} exchanges x {latency * 1e6:.0f} us"
    )
    seconds = sent / over.speed + exchanges * latency
    if stage == 3 and not setup.on_cpu:  # there the same cores do both
        seconds = max(0.0, seconds - compute) + 0.1 * min(seconds, compute)
        how += "; of what fits behind the computing a tenth is seen (assumed)"
    return [Figure("communication", seconds, "s", how)]


def _exchanges(setup: Setup, weights: Weights) -> float:
    """Return how many collectives a step has: of a bucket to each owner, or of each parameter that
    stage 3 cuts.
    """
    buckets = 1 + weights.trained // setup.size("reduce_bucket_size")
    if setup.stage == 0:
        return float(buckets)
    if setup.stage == 3:
        return float(setup.accumulation * (2 * weights.tensors + buckets))
    times = setup.accumulation if setup.stage == 2 else 1
    return float(times * buckets * setup.ranks + 1)


def _update(setup: Setup, weights: Weights, site: Site) -> Figure:
    share = weights.trained / (setup.ranks if setup.stage else 1)
    moved = (2 * (FP32 + setup.kept) + 2 * FP32 + setup.bytes) * share
    if setup.offload == "none":
        how = f"{setup.optimizer} reads and writes {count(moved)} bytes at {site.memory.how}"
        return Figure("update", moved / site.memory.speed, "s", how)
    over_bus = (FP32 + setup.bytes) * share
    if setup.offload == "parameters":  # fetched twice a micro-batch
        everything = weights.trained + weights.frozen
        over_bus += 2 * setup.accumulation * setup.bytes * everything / setup.ranks
    seconds = moved * setup.a_node / HOST_SPEED + over_bus / BUS_SPEED
    how = (
        f"{setup.optimizer} on the host moves {count(moved)} bytes x {setup.a_node} ranks at "
        f"{HOST_SPEED / 1e9:.4g} GB/s, and {count(over_bus)} bytes over the bus at "
        f"{BUS_SPEED / 1e9:.4g} GB/s (assumed)"
    )
    return Figure("update", seconds, "s", how)
