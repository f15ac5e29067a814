"""What fits, and what to choose: the lowest ZeRO stage that fits, and in it the micro-batch and
checkpointing that train fastest.

The lowest stage is also the fastest, as users have measured (DeepSpeed issues; Rajbhandari et al.
2020, table 2): each higher one sends more. So a higher one is asked only where a lower one holds no
row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hfscale.planning.memory import Memory, Setup, memory
from hfscale.planning.site import Site
from hfscale.planning.speed import Speed, speed
from hfscale.planning.subject import Subject

# of the same speed are settings that a roofline cannot tell apart: then the smaller one
ALIKE = 1.03
LARGEST_ROWS = 512  # of a micro-batch


@dataclass(frozen=True)
class Choice:
    """One way to train, what it holds and how fast it is. The model may be too large for it."""

    memory: Memory
    speed: Speed
    fits: bool

    @property
    def setup(self) -> Setup:
        """How it trains."""
        return self.memory.setup


def choice(subject: Subject, setup: Setup, site: Site) -> Choice:
    """Return what training as ``setup`` says takes."""
    config = subject.config
    step = subject.step(setup.micro_batch, checkpointing=setup.checkpointing)
    held = memory(setup, subject.weights, step)
    fast = speed(
        setup,
        subject.weights,
        step,
        site=site,
        seq_len=config.data.seq_len,
        flops_per_token=subject.flops_per_token,
        compiled=config.engine.compile,
    )
    return Choice(held, fast, held.peak.value <= site.memory_bytes)


def best_by_stage(subject: Subject, site: Site) -> list[Choice]:
    """Return the best way at each ZeRO stage, and with offloading where nothing fits without; one
    row with checkpointing where nothing fits.
    """
    base = subject.setup(site.ranks, a_node=site.a_node)
    stages = (0, 1, 2, 3) if base.precision == "fp32" else (1, 2, 3)
    found = [_best(subject, base.at(stage), site) for stage in stages]
    if not site.on_cpu and not any(one.fits for one in found):
        found.append(_best(subject, base.at(2, "optimizer"), site))
        found.append(_best(subject, base.at(3, "optimizer"), site))
        found.append(_best(subject, base.at(3, "parameters"), site))
    return found


def recommended(found: Sequence[Choice]) -> Choice | None:
    """Return the first that fits: the lowest stage; None: nothing does."""
    return next((one for one in found if one.fits), None)


def _best(subject: Subject, setup: Setup, site: Site) -> Choice:
    """Return the fastest way at one stage that fits."""
    fitting = list[Choice]()
    leanest: Choice | None = None
    for checkpointing in (False, True) if subject.checkpoints else (False,):
        for rows in _micro_batches(subject.config.train.global_batch, site.ranks):
            steps = max(1, subject.config.train.global_batch // (rows * site.ranks))
            asked = replace(
                setup, micro_batch=rows, accumulation=steps, checkpointing=checkpointing
            )
            one = choice(subject, asked, site)
            if not one.fits:
                leanest = one if rows == 1 or leanest is None else leanest
                break
            fitting.append(one)
    if not fitting:
        assert leanest is not None, "one row was tried"
        return leanest
    most = max(one.speed.tokens_per_s.value for one in fitting)
    return next(one for one in fitting if one.speed.tokens_per_s.value * ALIKE >= most)


def _micro_batches(global_batch: int, ranks: int) -> Iterator[int]:
    """Yield the sizes that divide a rank's part of the batch, small ones first."""
    own = max(1, global_batch // ranks)
    yield from (rows for rows in range(1, min(own, LARGEST_ROWS) + 1) if own % rows == 0)


def config_lines(one: Choice, subject: Subject) -> list[str]:
    """Return what to paste into a config."""
    setup, config = one.setup, subject.config
    batch = config.train.global_batch
    whole = setup.micro_batch * setup.accumulation * setup.ranks
    lines = ["train:"]
    if whole != batch:
        lines.append(f"  global_batch: {whole}  # {batch} cannot be cut among {setup.ranks} ranks")
    lines.append(f"  micro_batch: {setup.micro_batch}  # x {setup.accumulation} accumulated")
    lines += [
        "engine:",
        f"  zero_stage: {setup.stage}",
        f"  offload: {setup.offload}",
        f"  activation_checkpointing: {str(setup.checkpointing).lower()}",
    ]
    return lines
