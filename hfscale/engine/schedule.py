"""The learning rate as a pure function of the step: nothing to save, nothing to restore, nothing to
drift.

Steps count from 1: step s is the s-th update, so the first update of a warmup of W steps uses peak
/ W, and the last step of a run uses the schedule's end value. Sources: cosine, Loshchilov & Hutter
2017 (SGDR) without restarts; wsd (warmup, stable, decay), Hu et al. 2024 (MiniCPM).
"""

from __future__ import annotations

import math

from hfscale.config.rules import Length
from hfscale.config.schema import Schedule


def learning_rate(step: int, *, peak: float, length: Length, schedule: Schedule) -> float:
    """Return the learning rate of update ``step`` (1 .. ``length.steps``; later steps keep the end
    value).

    Rises linearly to ``peak`` over ``warmup_steps``, then follows the named shape down to
    ``min_ratio * peak``: where the global batch changed on the way, by the rows that were seen.
    """
    if step < 1:
        raise ValueError(f"steps count from 1, not {step}")
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    whole, at = length.steps + length.shift, step + length.shift
    decay_steps = whole - (schedule.warmup_steps if length.warmed is None else length.warmed)
    if schedule.name == "wsd":
        decay_steps = min(decay_steps, round(schedule.decay_fraction * whole))
    if decay_steps <= 0:
        return peak
    # 0 at the peak, 1 at the end
    progress = min(1.0, max(0.0, (at - (whole - decay_steps)) / decay_steps))
    falling = (
        0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1.0 - progress
    )
    return peak * (schedule.min_ratio + (1.0 - schedule.min_ratio) * falling)
