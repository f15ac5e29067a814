"""Which of its optimizers DeepSpeed wraps around ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hfscale.engine.library import deepspeed


@contextmanager
def one_optimizer_below_stage_3() -> Iterator[None]:
    """Have DeepSpeed take its optimizer of stages 1 and 2 where bf16 at stage 1 accumulates in
    fp32.

    That optimizer can do it, and does for fp16. For bf16 DeepSpeed would choose ``BF16_Optimizer``,
    which knows no offload, keeps its state elsewhere and has other hooks.
    """
    engine = deepspeed.runtime.engine.DeepSpeedEngine
    below_stage_3 = deepspeed.runtime.zero.config.ZERO_OPTIMIZATION
    choose = engine._do_optimizer_sanity_check

    def chosen(self: Any, optimizer: torch.optim.Optimizer) -> Any:
        wrapper = choose(self, optimizer)
        return below_stage_3 if self.zero_optimization() else wrapper

    engine._do_optimizer_sanity_check = chosen
    try:
        yield
    finally:
        engine._do_optimizer_sanity_check = choose
