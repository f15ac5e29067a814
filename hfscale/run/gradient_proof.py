"""Before the first step of every start: the gradient that the live engine is about to use is held
against plain autograd of the same rows through the same weights.

A release of DeepSpeed, an option or a kernel that loses a micro-batch, or divides by what it should
not, trains on without a word. So up to two micro-batches of the run's next step go through the live
engine on all ranks, up to the optimizer, which changes nothing; and once more through the bare
module with ``torch.autograd.grad``, whose sums over ranks torch alone makes. Compared are elements
of a sample of parameters: the first, the last, the embedding, a norm, and some at random.

Below ZeRO 3 the bare module is the live one, whose weights are whole on each rank; at ZeRO 3 it is
a copy, as long as that is small.

Shape legend: n elements of a sampled parameter, at most ``ELEMENTS``.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hfscale import run_files
from hfscale.config.schema import TrainConfig
from hfscale.dist.agree import sum_over_ranks
from hfscale.engine.engine import Engine
from hfscale.engine.fragments import Fragment
from hfscale.engine.layer_drop import take_over_layer_drop
from hfscale.engine.start import gathered
from hfscale.errors import ConfigError
from hfscale.log import logger
from hfscale.objectives.base import Batch
from hfscale.records import Count, Record, load
from hfscale.run.origin import skeleton
from hfscale.shards.files import write_atomically
from hfscale.training.accounting import agree_on_counts
from hfscale.training.loop import Trainer, seeded

MICRO_BATCHES = 2  # of each rank
RANDOM = 4  # parameters, beside those that are always looked at
ELEMENTS = 4096  # of a parameter
COPIED_BYTES = 2**32  # a larger model is not copied at ZeRO 3
# how far the two may be apart, of the norm of a parameter's gradient: kernels on a GPU add up in an
# order of their own
BOUNDS = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
# below this share of the usual element, a gradient is rounding (that of a key's bias, say)
ROUNDING = 0.1
ALIKE = 0.05  # of a wrong gradient and what it may be, or of factors
TRIES = 20  # of fp16, whose first loss scales overflow

Sampled = dict[str, Tensor]  # parameter -> values of its elements (n), fp32


class Compared(Record):
    """The gradient of a parameter, live and by plain autograd: norms over the sampled elements."""

    name: str
    shape: tuple[Count, ...]
    live: float
    plain: float
    off: float  # the norm of the difference, of that of ``plain``


class GradientProof(Record):
    """What was seen of the engine's gradient: ``RUN_DIR/gradient.json``, of the newest start."""

    zero_stage: Count
    precision: str
    ranks: Count
    micro_batches: Count  # of each rank
    bound: float
    parameters: tuple[Compared, ...]

    def lines(self) -> list[str]:
        """Return it as a table, the worst parameter first."""
        about = (
            f"ZeRO {self.zero_stage}, {self.precision}, {self.ranks} ranks, "
            f"{self.micro_batches} micro-batches each; allowed: {self.bound:g}"
        )
        lines = [about, f"{'off by':>9}  {'live norm':>10}  {'plain norm':>10}  parameter"]
        for one in sorted(self.parameters, key=lambda one: -one.off):
            shape = " x ".join(map(str, one.shape))
            lines.append(
                f"{one.off:9.1e}  {one.live:10.4g}  {one.plain:10.4g}  {one.name} ({shape})"
            )
        return lines


@dataclass(frozen=True)
class _Plain:
    """Gradients by plain autograd: of the step, and of what is lost where something goes wrong."""

    whole: Sampled
    last: Sampled  # of the last micro-batch of each rank alone
    own: Sampled  # of the rows of rank 0 alone


def prove_gradient(trainer: Trainer, config: TrainConfig) -> None:
    """Return if the engine's gradient is that of plain autograd; engine and stream are as they
    were. Collective.

    Raises:
        ConfigError: on every rank, with what differs.
    """
    engine, stage = trainer.engine, trainer.engine.stage
    bare: nn.Module | None = engine.module
    if stage == 3:
        bare = _copy(trainer, config)
    if bare is None:
        return
    names = _sample(engine.module, seed=trainer.seed)
    if not names:
        return
    rows = trainer.stream.take()[:MICRO_BATCHES]
    batches = [trainer.objective.collate(micro) for micro in rows]
    counts = agree_on_counts(trainer.accounting, rows, batches)
    if not any(counts[term] for term, weight in trainer.objective.weights().items() if weight):
        return  # all of these rows are left out or damaged
    plain = _plain(trainer, bare, batches, counts, names)
    live = _live(trainer, batches, counts, names)
    shapes = {name: _shape(param) for name, param in engine.module.named_parameters()}
    table = compare(live, plain.whole, shapes)
    worst, bound = max(table, key=lambda one: one.off), BOUNDS[engine.precision]
    words = f"{worst.off:.1e} of its norm at most ({worst.name}; {engine.precision} may {bound:g})"
    if engine.all.rank == 0:
        _write(config, table, engine, micro_batches=len(batches))
    if not worst.off <= bound:  # nor where it is no number
        raise ConfigError(
            "the engine's gradient is not that of plain autograd; nothing was trained",
            where=f"engine (ZeRO {stage}, {engine.precision}, {engine.all.size} ranks)",
            value=f"{words}: {_diagnosis(live, plain, ranks=engine.all.size, micros=len(batches))}",
            remedy="use a release of DeepSpeed that setup.cfg names, without engine.extra; "
            "`hfscale prove engine CONFIG` prints the table. engine.prove=false trains anyway",
        )
    logger.info(
        f"the engine's gradient of {len(batches)} micro-batches a rank is that of plain autograd: "
        f"off by {words}"
    )


# ------------------------------------------------------------------------------------- the sample
def _sample(module: nn.Module, *, seed: int) -> dict[str, Tensor]:
    """Return the elements (n; int64) to look at, by parameter."""
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    names = [*trained]
    if not names:
        return {}
    chosen = {names[0], names[-1]}
    chosen |= {name for name in names if "embed" in name.lower()}.intersection(names[:3])
    norms = [name for name in names if "norm" in name.lower() or "ln_" in name.lower()]
    chosen.update(norms[:1])
    chosen.update(random.Random(seed).sample(names, min(RANDOM, len(names))))
    sample = {}
    for name in names:
        if name in chosen:
            numel = math.prod(_shape(trained[name]))
            stride = -(-numel // ELEMENTS) | 1  # odd, so that none stays in one column
            sample[name] = torch.arange(0, numel, stride)
    return sample


def _shape(param: Tensor) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))


# ------------------------------------------------------------------------------- plain autograd
def _copy(trainer: Trainer, config: TrainConfig) -> nn.Module | None:
    """Return the weights of ZeRO 3 in a module of their own, whole on every rank; None where that
    is too large, or what adapters have changed.
    """
    live = trainer.engine.module
    numel = sum(math.prod(_shape(param)) for param in live.parameters())
    element = next(live.parameters()).element_size()
    if config.model.lora or numel * element > COPIED_BYTES:
        why = "adapters" if config.model.lora else f"a copy takes {numel * element / 2**30:.1f} GiB"
        logger.info(f"the engine's gradient was not held against plain autograd at ZeRO 3: {why}")
        return None
    copy = skeleton(config, deepcopy(live.config), trainer.objective.auto_model)
    take_over_layer_drop(copy)
    copy.to_empty(device=trainer.engine.device)
    copy.tie_weights()
    theirs = dict(copy.named_parameters())
    with torch.no_grad():
        for name, param in live.named_parameters():
            with gathered([param]):
                theirs[name].copy_(param)
            theirs[name].requires_grad_(param.requires_grad)
        buffers = dict(live.named_buffers())
        for name, buffer in copy.named_buffers():
            buffer.copy_(buffers[name])
    copy.train(live.training)
    return copy


def _plain(
    trainer: Trainer,
    bare: nn.Module,
    batches: Sequence[Batch],
    counts: Mapping[str, int],
    sample: Mapping[str, Tensor],
) -> _Plain:
    """Return the gradients of ``batches`` by plain autograd, summed over ranks."""
    data, device = trainer.objective.setting.data, trainer.engine.device
    params = dict(bare.named_parameters())
    wanted = [params[name] for name in sample]
    on_device = [batch.to(device) for batch in batches]
    losses = trainer.accounting.losses(bare, on_device, counts)
    parts = list[Sampled]()
    for loss in seeded(losses, seed=trainer.seed, step=trainer.state.step, rank=data.rank):
        gradient = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        picked = {}
        for (name, elements), whole in zip(sample.items(), gradient, strict=True):
            picked[name] = whole.reshape(-1)[elements.to(device)].float().cpu()
        parts.append(picked)
    trainer.accounting.take_sums()
    summed = {name: torch.stack([part[name] for part in parts]).sum(0) for name in sample}
    first = data.rank == 0
    return _Plain(
        whole=_over_ranks(summed, 1 / data.size),
        last=_over_ranks(parts[-1], 1 / data.size),
        own=_over_ranks({name: values * first for name, values in summed.items()}, 1.0),
    )


def _over_ranks(values: Sampled, factor: float) -> Sampled:
    """Return the sum over all ranks, times ``factor``. Collective."""
    flat = sum_over_ranks(torch.cat([*values.values()]).double()) * factor
    sizes = [len(one) for one in values.values()]
    return dict(zip(values, flat.float().split(sizes), strict=True))


# ------------------------------------------------------------------------------- the live engine
def _live(
    trainer: Trainer,
    batches: Sequence[Batch],
    counts: Mapping[str, int],
    sample: Mapping[str, Tensor],
) -> Sampled:
    """Return what the optimizer would have used for ``batches``, and leave it all as it was."""
    engine = trainer.engine
    own = {name: torch.zeros(len(elements)) for name, elements in sample.items()}
    shown = list[str]()

    def read(fragment: Fragment, gradient: Tensor, clipped_by: float) -> None:
        elements = sample[fragment.name] - fragment.start
        here = (elements >= 0) & (elements < fragment.numel)
        picked = gradient[elements[here].to(gradient.device)].float().cpu()
        own[fragment.name][here] = picked * clipped_by
        shown.append(fragment.name)

    scalars = engine.scalars()
    for _ in range(TRIES if engine.precision == "fp16" else 1):
        with engine.gradients_shown(sample, read):
            trainer.update(batches, counts, allow=lambda norm: False)
        trainer.accounting.take_sums()
        if int(sum_over_ranks(torch.tensor(len(shown)))):
            break
    engine.load_scalars(scalars)  # fp16 has lowered its scale
    trainer.forget_loss()
    return _over_ranks(own, 1.0)


# ------------------------------------------------------------------------------------- comparing
def compare(live: Sampled, plain: Sampled, shapes: Mapping[str, tuple[int, ...]]) -> list[Compared]:
    """Return how far the gradients are apart, by parameter."""
    total = math.sqrt(sum(float(values.square().sum()) for values in plain.values()))
    usual = total / math.sqrt(sum(len(values) for values in plain.values()))
    table = []
    for name, values in plain.items():
        norm = float(values.norm())
        apart = float((live[name] - values).norm())
        least = max(norm, ROUNDING * usual * math.sqrt(len(values)))
        off = apart / least if least else (math.inf if apart else 0.0)
        if not math.isfinite(apart):
            off = math.inf
        table.append(
            Compared(
                name=name,
                shape=shapes[name],
                live=float(live[name].norm()),
                plain=norm,
                off=off,
            )
        )
    return table


def _diagnosis(live: Sampled, plain: _Plain, *, ranks: int, micros: int) -> str:
    """Return what a wrong gradient looks like, in words."""
    seen = torch.cat([*live.values()])
    if not torch.isfinite(seen).all():
        return "it has numbers that are none"
    if not seen.any():
        return "it is zero"
    known = {
        "a whole step": plain.whole,
        "the last micro-batch of each rank alone": plain.last,
        "the rows of rank 0 alone": plain.own,
    }
    for what, values in known.items():
        right = torch.cat([*values.values()])
        ratio = float(seen @ right / max(float(right @ right), 1e-30))
        if float((seen - ratio * right).norm()) <= ALIKE * float(seen.norm()):
            return f"it is that of {what}{_factor(ratio, ranks=ranks, micros=micros)}"
    return "it is none that is known"


def _factor(ratio: float, *, ranks: int, micros: int) -> str:
    """Return by what a gradient was multiplied, in words."""
    if abs(ratio - 1) < ALIKE:
        return ""
    sizes = {f"{ranks} ranks": ranks, f"{micros} micro-batches": micros}
    times = [name for name, size in sizes.items() if abs(ratio / size - 1) < ALIKE]
    shares = [name for name, size in sizes.items() if abs(ratio * size - 1) < ALIKE]
    if times:
        return f", times the {' or the '.join(times)}"
    if shares:
        return f", divided by the {' or the '.join(shares)}"
    return f", times {ratio:.4g}"


def _write(
    config: TrainConfig, table: Sequence[Compared], engine: Engine, *, micro_batches: int
) -> None:
    """Write the table into the run, for `hfscale prove engine`."""
    proof = GradientProof(
        zero_stage=engine.stage,
        precision=engine.precision,
        ranks=engine.all.size,
        micro_batches=micro_batches,
        bound=BOUNDS[engine.precision],
        parameters=tuple(table),
    )
    content = json.dumps(proof.model_dump(), indent=1)
    write_atomically(config.run_dir / run_files.GRADIENT_PROOF, content.encode())


def proof_of(run_dir: Path) -> GradientProof | None:
    """Return what the newest start of a run saw, if it looked.

    Raises:
        DataError: if the file is damaged.
    """
    file = run_dir / run_files.GRADIENT_PROOF
    if not file.is_file():
        return None
    return load(file, GradientProof, what="the proof of the gradient")
