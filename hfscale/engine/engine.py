"""The one place that talks to DeepSpeed: five verbs over a partitioned model, and live views of its
state.

``engine(...)`` forward, ``backward`` (as often as there are micro-batches), one ``step``,
``fragments`` to save and load, ``close``. Always call the engine, never ``engine.module``: at ZeRO
3 the latter gives wrong gradients without an error. A process group must be up before anything here
is called (``hfscale.dist.group``).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from hfscale.config.schema import TrainConfig
from hfscale.dist.group import everybody
from hfscale.engine import fragments as parts
from hfscale.engine import gradients
from hfscale.engine.arrivals import Arrivals, SameModules, fill
from hfscale.engine.ds_config import deepspeed_config, running_stage
from hfscale.engine.flops import flops_profiled
from hfscale.engine.fragments import Fragment
from hfscale.engine.gradients import Reader
from hfscale.engine.groups import layer_names
from hfscale.engine.kept import kept
from hfscale.engine.layer_drop import take_over_layer_drop
from hfscale.engine.layer_sums import LayerSums
from hfscale.engine.library import deepspeed
from hfscale.engine.matrices import Matrices
from hfscale.engine.muon import Muon
from hfscale.engine.optimizers import make_optimizer
from hfscale.engine.start import extra_named, join_process_group
from hfscale.engine.wrapper import one_optimizer_below_stage_3
from hfscale.errors import ConfigError, LossScaleError, UnhealthyError

# says of the norm of a gradient whether the update may be made
Allow = Callable[[float], bool]
AT_FLOOR = "loss scale already at minimum"  # DeepSpeed's words
# of DeepSpeed's dynamic scaler (fp16)
LOSS_SCALE_STATE = (
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "cur_hysteresis",
)


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did."""

    # L2 over the whole model, before clipping; inf (fp16 only): skipped, the loss scale was too
    # high and has been lowered
    grad_norm: float
    lr: float
    updated: bool = True  # False: ``allow`` said no, or the loss scale was too high


class Engine:
    """A model under DeepSpeed at one ZeRO stage. Make one with ``create``; ``close`` it before the
    process group.
    """

    def __init__(self, ds: Any, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        self._ds, self._optimizer = ds, optimizer
        self._zero = ds.optimizer  # at stage 0 it is ``optimizer`` itself
        self.optim = config.optim
        self._norm = 0.0
        self._lr_used: set[float] = set()
        self.stage: int = running_stage(config.engine)
        self.precision: str = config.engine.precision
        # then the frozen weights are kept where they came from
        self.adapted: bool = config.model.lora is not None
        self.device: torch.device = ds.device
        self.all = everybody()
        self._trained = [param for param in ds.module.parameters() if param.requires_grad]
        if self.stage >= 2:
            Arrivals(ds.module, self._zero, stage=self.stage)
        self._modules = SameModules(self._zero) if self.stage == 3 and self.all.size > 1 else None
        self._shown: tuple[Collection[str], Reader] | None = None  # in the next step
        self._allow: Allow | None = None
        self._allowed: bool | None = None  # None: not asked yet
        self._layers = LayerSums(lambda: self.fragments(frozen=False), layer_names(ds.module))
        self._groups = dict(parts.flats(self._zero, optimizer, stage=self.stage))
        if isinstance(optimizer, Muon):
            optimizer.matrices = self._matrices()
        self._update = optimizer.step
        optimizer.step = self._guarded_update  # type: ignore[method-assign]

    @classmethod
    def create(cls, model: nn.Module, *, config: TrainConfig, device: torch.device) -> Engine:
        """Return the engine that trains ``model``, which it takes over (and casts, at 16 bit).

        Raises:
            ConfigError: if ``engine.*`` asks for what cannot run here.
        """
        settings = deepspeed_config(config, device_type=device.type)
        if config.engine.activation_checkpointing:
            _enable_activation_checkpointing(model)
        take_over_layer_drop(model)
        join_process_group()
        optimizer = make_optimizer(model, config.optim)
        with one_optimizer_below_stage_3(), extra_named(config):
            ds, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        if config.engine.compile:
            ds.compile()
        return cls(ds, optimizer, config)

    @property
    def module(self) -> Any:
        """The transformers model, to look at: names, config, shapes. Never call it."""
        return self._ds.module

    # ------------------------------------------------------------------------------------- training
    def __call__(self, **inputs: Any) -> Any:
        """Return the model's output."""
        try:
            return self._ds(**inputs)
        except RuntimeError as error:
            if self._modules is None or "disagreement on list contents" not in str(error):
                raise
            raise self._modules.error() from error

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar. The ranks' gradients are averaged: scale the loss by world
        size / global count.

        Raises:
            ConfigError: if the ranks went through different modules at ZeRO 3.
        """
        if self._modules is not None:
            self._modules.check()
        self._ds.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, *, allow: Allow | None = None, measure: bool = False) -> StepStats:
        """Return what the update with everything accumulated since the last step did: clip, check,
        update at ``lr``.

        ``allow`` is asked once, before anything changes, with the norm that ``StepStats`` will
        give. Where it says no, weights and moments stay as they are, bit for bit, and training may
        go on. The norm is the same on all ranks, and ``allow`` must answer alike on all: it
        looks at this norm and at what the ranks have agreed on, so no collective is needed. A norm
        that is not finite is asked about too, and only a no lets training go on. With ``measure``
        the step's ``layer_sums`` are taken on the way.

        Raises:
            UnhealthyError: on every rank, with weights and moments untouched, if the gradient is
                not finite and ``allow`` did not say no (fp16: the step is skipped and the loss
                scale lowered instead, until that is at its floor). The engine must not be trained
                further.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]
        self._lr_used.clear()
        self._allow, self._allowed = allow, None
        self._layers.begin(measure)
        if self.stage < 2:
            fill(self._zero, self._trained, stage=self.stage)
        try:
            self._ds.step()
        except Exception as error:
            if AT_FLOOR not in str(error):
                raise
            raise LossScaleError(
                "the gradient overflows fp16 at the lowest loss scale; weights were not changed"
            ) from error
        if getattr(self._zero, "overflow", False):
            if self.precision != "fp16":
                self._drop(math.inf)
            return StepStats(float("inf"), lr, updated=False)
        expected = {lr * group["lr_share"] for group in self._optimizer.param_groups}
        assert self._lr_used == expected, (
            f"the optimizer used learning rates {self._lr_used}, not {expected}"
        )
        return StepStats(self._norm, lr, updated=self._allowed is not False)

    @contextmanager
    def gradients_shown(self, names: Collection[str], read: Reader) -> Iterator[None]:
        """Have the steps made inside show ``read`` what the ranks have added up for the parameters
        ``names``: to each rank the fragments that are its own.
        """
        self._shown = names, read
        try:
            yield
        finally:
            self._shown = None

    def _show(self) -> None:
        """Show what the optimizer is about to use, if somebody has asked."""
        if self._shown is None:
            return
        names, read = self._shown
        # as DeepSpeed and torch divide it
        clipped_by = max(1.0, (self._norm + 1e-6) / (self.optim.clip_norm or math.inf))
        own = self.fragments(frozen=False)
        gradients.show(own, self._optimizer, read, names=names, clipped_by=clipped_by)

    def _guarded_update(self, closure: Any = None) -> Any:
        """Update the weights, unless ``allow`` says no. DeepSpeed calls it in place of the
        optimizer's ``step``, once for each group of parameters; ZeRO has clipped by now.
        """
        optimizer = self._optimizer
        self._lr_used.update(group["lr"] for group in optimizer.param_groups)
        self._norm = self._clip() if self.stage == 0 else float(self._zero._global_grad_norm)
        self._show()
        if self._allowed is None:
            if math.isfinite(self._norm):
                self._allowed = self._allow is None or self._allow(self._norm)
            else:
                self._drop(self._norm)
        if not self._allowed:
            return None
        with self._layers.around(optimizer):
            return self._update(closure)

    def _drop(self, norm: float) -> None:
        """Return if ``allow`` says that a gradient that is not finite may be dropped."""
        if self._allow is None or self._allow(norm):
            raise UnhealthyError("the gradient is not finite; weights were not changed")
        self._allowed = False

    def _clip(self) -> float:
        """Return the norm of the gradient, now clipped: what ZeRO does at the other stages."""
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        norm = gradients.norm([param.grad for param in params if param.grad is not None])
        if self.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(params, self.optim.clip_norm, norm)
        return norm.item()

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """No gradients, no dropout inside."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(training)

    def flops_profiled(self, step: int, file: Path) -> AbstractContextManager[None]:
        """Return a context in which DeepSpeed counts what is computed, written to ``file``."""
        return flops_profiled(self.module, self._ds, step=step, file=file)

    # ---------------------------------------------------------------------------------------- state
    def fragments(self, *, owned: bool = True, frozen: bool = True) -> list[Fragment]:
        """Return live views of this rank's state; of ``frozen`` parameters only where asked.

        ``owned``: a share that is disjoint from other ranks' and with them covers everything, to be
        saved. Otherwise all that this rank holds, to be loaded; call ``after_load`` when it has
        been written.
        """
        left_out = (
            set()
            if frozen
            else {name for name, param in self.module.named_parameters() if not param.requires_grad}
        )
        replicated: Iterator[Fragment] = (
            fragment
            for fragment in parts.replicated(self.module, stage=self.stage, kept=self._kept)
            if fragment.name not in left_out
        )
        if owned:
            replicated = parts.share(replicated, place=self.all)
        if self.stage == 0:
            return list(replicated)
        own = parts.partitioned(
            self.module, self._zero, stage=self.stage, kept=self._kept, rank=self.all.rank
        )
        return [*(fragment for fragment in own if fragment.name not in left_out), *replicated]

    def _kept(self, flat: Tensor) -> dict[str, Tensor]:
        return kept(self._optimizer, self._groups[flat], flat)

    def _matrices(self) -> Matrices:
        """Return where the matrices lie that Muon makes orthogonal. Collective."""
        flats = [flat for flat, group in self._groups.items() if group["orthogonal"]]
        fragments = self.fragments(owned=False, frozen=False)
        return Matrices(fragments, flats, place=self.all, replicated=self.stage == 0)

    @torch.no_grad()
    def after_load(self) -> None:
        """Derive the weights that the model computes with from the fp32 weights just written into
        ``fragments``. Collective.
        """
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        elif self.stage == 3:  # as at the end of DeepSpeed's own step
            self._zero._partition_all_parameters()
            for group in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            self._zero._post_step(set())

    @property
    def layers(self) -> list[str]:
        """The parts of the model whose parameters are trained, by the names that people use."""
        return self._layers.names

    def layer_sums(self) -> Tensor:
        """Return this rank's share of ``LayerSums.sums`` of the last step, which was measured."""
        return self._layers.sums

    @property
    def loss_scale(self) -> float | None:
        """What fp16 multiplies the loss by; None at other precisions."""
        return float(self._zero.loss_scaler.cur_scale) if self.precision == "fp16" else None

    def scalars(self) -> dict[str, Any]:
        """Return the state that is not a tensor: Adam's step count and the loss scaler's."""
        states = self._optimizer.state.values()
        steps = {int(state["step"]) for state in states if "step" in state}
        assert len(steps) <= 1, f"parameters of one optimizer stand at different steps: {steps}"
        scaler = getattr(self._zero, "loss_scaler", None) if self.precision == "fp16" else None
        return {
            "adam_step": max(steps, default=0),
            "loss_scaler": None
            if scaler is None
            else {key: getattr(scaler, key) for key in LOSS_SCALE_STATE},
        }

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Take over what ``scalars`` returned, on whatever stage and world size."""
        # also for flat weights that are nothing but padding on this rank, and so have no fragments
        for flat in self._groups:
            self._kept(flat)
            state = self._optimizer.state[flat]
            if "step" in state:
                state["step"].fill_(scalars["adam_step"])
        if self.precision == "fp16" and scalars["loss_scaler"]:
            for key, value in scalars["loss_scaler"].items():
                setattr(self._zero.loss_scaler, key, value)

    def close(self) -> None:
        """Tear DeepSpeed down while all ranks are still there. Collective; a second call does
        nothing.

        ZeRO 3 leaves all-gathers under way. A gloo thread that ends one while the interpreter is
        finalizing wants the GIL to drop its tensors, cannot have it, and aborts the process. A
        barrier on DeepSpeed's own group waits for them.
        """
        if self._ds is None:
            return
        torch_dist.barrier(group=self._ds.seq_data_parallel_group)
        self._ds.destroy()
        self._ds = self._zero = self._optimizer = None  # type: ignore[assignment]
        gc.collect()


def _enable_activation_checkpointing(model: nn.Module) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            "this architecture has no activation checkpointing",
            where="engine.activation_checkpointing",
            value=True,
            remedy="engine.activation_checkpointing=false",
        )
    how = {"use_reentrant": False}
    model.gradient_checkpointing_enable(how)  # type: ignore[operator]
