"""A model that only computes: whole on each rank, or under DeepSpeed at ZeRO stage 3, a share of
every weight on each.

ZeRO-Inference: Aminabadi et al. 2022 (arXiv 2207.00032), sec. 6. Stages 1 and 2 partition gradients
and optimizer, which are not there. What tasks, loaders and probes use of ``Engine`` is here as
well: call it, look at ``module``, fill its ``fragments``, ``close`` it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn

from hfscale.config.inference import Inference
from hfscale.dist.group import everybody
from hfscale.engine import fragments as parts
from hfscale.engine.ds_config import inference_config
from hfscale.engine.fragments import Fragment

# constructs the model inside the context that it is given
Build = Callable[[Callable[[], AbstractContextManager[Any]]], nn.Module]


class InferenceEngine:
    """A model in evaluation mode. ``create`` one, or put it ``InferenceEngine(model)`` around a
    model that has its weights.
    """

    def __init__(self, model: Any, *, device: torch.device | None = None, ds: Any = None) -> None:
        self.module = model.eval() if ds or device is None else model.eval().to(device)
        self.device: torch.device = device or model.device
        self._ds = ds
        self.all = everybody()

    @classmethod
    def create(
        cls, build: Build, *, how: Inference, precision: str, device: torch.device
    ) -> InferenceEngine:
        """Return the engine around what ``build`` makes, on ``device``. Stage 3 is collective and
        needs a process group.

        Raises:
            ConfigError: if ``engine.*`` asks for what cannot run here.
        """
        if how.zero_stage < 3:
            return cls(build(nullcontext), device=device)
        from hfscale.engine.library import deepspeed  # slow to import
        from hfscale.engine.start import join_process_group

        join_process_group()
        settings = inference_config(how, precision=precision, device_type=device.type)
        model = build(lambda: deepspeed.zero.Init(config_dict_or_path=settings))
        ds, *_ = deepspeed.initialize(model=model, config=settings, dist_init_required=False)
        return cls(model, device=device, ds=ds)

    @property
    def together(self) -> bool:
        """Whether each forward pass is one of all ranks, which then must be as many on each."""
        return self._ds is not None and self.all.size > 1

    def __call__(self, **inputs: Any) -> Any:
        """Return the model's output."""
        return (self._ds or self.module)(**inputs)

    def fragments(self, *, owned: bool = False) -> list[Fragment]:
        """Return live views of what this rank holds, to be filled before the first pass."""
        assert not owned, "nothing is saved here"
        return list(parts.held(self.module, rank=self.all.rank))

    def after_load(self) -> None:
        """Do nothing: the weights that were filled are those that compute."""

    def close(self) -> None:
        """Tear DeepSpeed down while all ranks are still there, as ``Engine.close``."""
        if self._ds is not None:
            torch_dist.barrier(group=self._ds.seq_data_parallel_group)
            self._ds.destroy()
            self._ds = None
