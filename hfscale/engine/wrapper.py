"""Which of its optimizers DeepSpeed wraps around ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION


@contextmanager
def one_optimizer_below_stage_3() -> Iterator[None]:
    """Have DeepSpeed take its optimizer of stages 1 and 2 where bf16 at stage 1 accumulates in
    fp32.

    That optimizer can do it, and does for fp16. For bf16 DeepSpeed would choose ``BF16_Optimizer``,
    which knows no offload, keeps its state elsewhere and has other hooks.
    """
    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def chosen(self: DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> Any:
        wrapper = choose(self, optimizer)
        return ZERO_OPTIMIZATION if self.zero_optimization() else wrapper

    DeepSpeedEngine._do_optimizer_sanity_check = chosen
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose
