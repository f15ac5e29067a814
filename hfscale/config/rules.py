"""What two sections of a config have to do with each other: contradictions, batch arithmetic, and
what a resume may change.

What DeepSpeed refuses is in ``engine/ds_config.py``, what a model refuses in ``models/build.py``;
both are checked before a run starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from hfscale.config.finetune import Examples
from hfscale.config.schema import Data, Engine, Model, Optim, Train, TrainConfig
from hfscale.config.section import Section
from hfscale.config.unsafe import unsafe
from hfscale.errors import ConfigError, nearest
from hfscale.metrics.better import lower_is_better

Problem = tuple[str, str]  # key, what is wrong


def problems(config: TrainConfig) -> list[Problem]:
    """Return everything that sections of a valid shape contradict each other in."""
    data, model = config.data, config.model
    wrong = [*_length_problems(config.train), *_model_problems(model)]
    wrong += _optim_problems(config.optim)
    wrong += unsafe(config.engine.extra, stage=config.engine.zero_stage)
    wrong += _engine_problems(config.engine)
    wrong += _validation_problems(config)
    if not isinstance(data, Examples):
        return [*wrong, *_mixture_problems(data)]
    if config.train.tokens is not None:
        wrong.append(("train.tokens", "examples differ in length: say train.epochs or train.steps"))
    if config.tokenizer is None and model.pretrained is None:
        why = "a model with new weights has no tokenizer of its own: set tokenizer.path"
        wrong.append(("tokenizer", why))
    if sum(part for part in (data.validation, data.test) if isinstance(part, float)) >= 1:
        wrong.append(("data.validation", "validation and test leave nothing to train on"))
    return wrong


def _length_problems(train: Train) -> Iterator[Problem]:
    lengths = [name for name in ("steps", "epochs", "tokens") if getattr(train, name) is not None]
    if len(lengths) != 1:
        given = " and ".join(f"train.{name}" for name in lengths) or "none of them"
        remedy = f"; take one back with train.{lengths[0]}=null" if lengths else ""
        yield (
            f"train.{lengths[-1]}" if lengths else "train.steps",
            "a run is as long as exactly one of train.steps, train.epochs and "
            f"train.tokens says, here {given}{remedy}",
        )
    if train.global_batch % train.micro_batch:
        divisors = nearest_text(_divisors(train.global_batch), train.micro_batch)
        yield (
            "train.micro_batch",
            f"{train.micro_batch} does not divide train.global_batch={train.global_batch}; "
            f"{divisors} would",
        )


def _model_problems(model: Model) -> Iterator[Problem]:
    if (model.architecture is None) == (model.pretrained is None):
        yield (
            "model.architecture",
            "give exactly one of model.architecture (new weights) and model.pretrained (a "
            "run, a folder or a hub name)",
        )
    if model.lora and model.pretrained is None:
        yield "model.lora", "adapters stand beside pretrained weights: set model.pretrained"
    elif model.lora and model.freeze:
        yield (
            "model.lora",
            "all that has pretrained weights is frozen beside adapters: take back model.freeze",
        )


def _engine_problems(engine: Engine) -> Iterator[Problem]:
    if engine.head == "chunked" and engine.compile:
        yield (
            "engine.head",
            "a compiled model has its head compiled in: set engine.compile=false, or engine.head="
            "plain",
        )
    if engine.head == "chunked" and engine.precision == "fp16":
        yield (
            "engine.head",
            "the gradient that it makes in the forward pass is too small for fp16, whose loss "
            "scale comes later: set engine.precision=bf16, or engine.head=plain",
        )


def _optim_problems(optim: Optim) -> Iterator[Problem]:
    for key in optim.unknown:
        having = [name for name, usual in optim.usual.items() if key in usual]
        yield (
            f"optim.{key}",
            f"{optim.name} has no {key} ({', '.join(having)} have): take it out, or set "
            f"optim.{key}=null",
        )


def _validation_problems(config: TrainConfig) -> Iterator[Problem]:
    best = config.checkpoint.keep_best
    if best and config.data.validation is None:
        examples = isinstance(config.data, Examples)
        setting = "data.validation" if examples else "data.validation.shards"
        yield (
            "checkpoint.keep_best",
            f"there is no validation to find the best by: set {setting}, or take it back",
        )
    if best and best.mode == "max" and lower_is_better(best.metric):
        yield (
            "checkpoint.keep_best.mode",
            f"max would keep the worst {best.metric}: set checkpoint.keep_best.mode=min",
        )
    if config.metrics.samples and config.data.validation is None:
        yield (
            "metrics.samples",
            "they come with validations, and there is none: set data.validation",
        )
    if config.train.patience and not best:
        yield (
            "train.patience",
            "nothing says what shall become better: set checkpoint.keep_best.metric",
        )


def _mixture_problems(data: Data) -> Iterator[tuple[str, str]]:
    weights = {source.name: source.weight for source in data.sources}
    for number, source in enumerate(data.sources):
        if source.name in [other.name for other in data.sources[:number]]:
            yield (
                f"data.sources.{number}.name",
                f"two sources are named {source.name}: give each a name of its own",
            )
    if not any(weights.values()):
        yield (
            "data.sources",
            "the weights sum to nothing: give at least one source a weight above 0",
        )
    for number, stage in enumerate(data.stages):
        key = f"data.stages.{number}.weights"
        yield from (
            (key, f"there is no source {name}; {nearest(name, weights)}")
            for name in stage.weights
            if name not in weights
        )
        weights |= {name: weight for name, weight in stage.weights.items() if name in weights}
        if not any(weights.values()):
            yield (
                key,
                "from this stage on all weights are 0: a source that is not named keeps its weight",
            )


MANY_EPOCHS = (
    4.5  # Muennighoff et al. 2023: up to 4 passes over the same text are nearly as good as new text
)


def notices(config: TrainConfig, *, rows: int = 0, length: Length | None = None) -> list[str]:
    """Return what is allowed but probably not meant.

    ``rows`` (of an epoch) and ``length`` are not known before the data was read, where the config
    does not say steps or tokens.
    """
    train, lines = config.train, list[str]()
    if length is None and train.epochs is None:
        length = run_length(train, rows=0, seq_len=config.data.seq_len)
    if length and config.schedule.warmup_steps >= length.steps:
        asked = next(name for name in ("steps", "epochs", "tokens") if getattr(train, name))
        lines.append(
            f"schedule.warmup_steps={config.schedule.warmup_steps} is not below the "
            f"{length.steps} steps of "
            f"train.{asked}={getattr(train, asked)}: the learning rate never gets to optim.lr"
        )
    if length and rows and isinstance(config.data, Data):
        epochs = (length.steps + length.shift) * train.global_batch / rows
        if epochs > MANY_EPOCHS:
            lines.append(
                f"the run goes {epochs:,.1f} times over the same {rows:,} rows: past about 4 "
                "epochs repeated text "
                "teaches little; build more data, or train for fewer steps"
            )
    if config.engine.zero_stage == 0 and config.engine.precision != "fp32":
        lines.append(
            f"{config.engine.precision} at ZeRO stage 0 runs as stage 1 (the same result in "
            "less memory)"
        )
    return lines


# --------------------------------------------------------------------------------- batch arithmetic
@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut. All but ``accumulation`` and ``data_size`` are in sequences."""

    global_batch: int
    micro_batch: int
    accumulation: int  # micro-batches that a rank takes a step
    data_size: int  # ranks that read different rows

    @property
    def equation(self) -> str:
        return (
            f"global_batch {self.global_batch} = micro_batch {self.micro_batch} x accumulation "
            f"{self.accumulation}"
            f" x world_size {self.data_size}"
        )


def solve_batch(global_batch: int, *, micro_batch: int, data_size: int) -> BatchPlan:
    """Return the cut of ``global_batch`` into equal micro-batches of ``data_size`` ranks.

    Raises:
        ConfigError: if there is none; it gives the nearest values that would do.
    """
    accumulation, rest = divmod(global_batch, micro_batch * data_size)
    if rest == 0:
        return BatchPlan(global_batch, micro_batch, accumulation, data_size)
    unit = micro_batch * data_size
    multiples = [accumulation * unit, (accumulation + 1) * unit]
    offers = [f"train.global_batch={nearest_text(multiples, global_batch)}"]
    if global_batch % data_size == 0:
        offers.append(
            f"train.micro_batch={nearest_text(_divisors(global_batch // data_size), micro_batch)}"
        )
    if global_batch % micro_batch == 0:
        offers.append(
            f"world_size {nearest_text(_divisors(global_batch // micro_batch), data_size)}"
        )
    raise ConfigError(
        f"global_batch {global_batch} cannot be cut into micro-batches of {micro_batch} on "
        f"{data_size} ranks",
        where="train.global_batch",
        value=f"{global_batch} / ({micro_batch} x {data_size}) = {global_batch / unit:.3g}",
        remedy=", or ".join(offers),
    )


@dataclass(frozen=True)
class Length:
    """Where a run ends: at step ``steps``.

    ``shift`` is how many steps of the present global batch its rows come to at any step, less the
    steps that they were: 0 unless a run goes on with another batch. ``steps + shift`` is the whole
    run in steps of the present batch. ``warmed`` is where its warm-up ended, in those; None: at the
    step that the schedule says.
    """

    steps: int
    shift: float = 0.0
    warmed: float | None = None


def run_length(
    train: Train, *, rows: int, seq_len: int, step: int = 0, consumed_rows: int = 0
) -> Length:
    """Return the length of a run over ``rows`` rows an epoch that stands at ``step``: what was
    done, and what is left.

    Left are the whole steps that cover the rest of ``train.epochs`` or ``train.tokens``, whatever
    batches came before.
    """
    if train.steps is not None:
        return Length(train.steps)
    wanted_rows = train.tokens / seq_len if train.tokens is not None else (train.epochs or 0) * rows
    left = max(0, math.ceil((wanted_rows - consumed_rows) / train.global_batch - 1e-9))
    return Length(max(1, step + left), consumed_rows / train.global_batch - step)


def warmed_rows(
    warmup_steps: int, *, global_batch: int, step: int, consumed_rows: int, saved: int | None
) -> int:
    """Return after how many rows the warm-up has ended, or will; ``saved`` is what the run's
    checkpoint says of the same one.

    A fact of the run, which every later checkpoint repeats: whatever batches and resumes follow,
    the rate at a row stays.
    """
    if step < warmup_steps:
        return consumed_rows + (warmup_steps - step) * global_batch
    if saved is not None:
        return saved
    return round(warmup_steps * consumed_rows / step) if step else 0


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0] if number < 10**6 else [1, number]


def nearest_text(values: list[int], wanted: int) -> str:
    """Return the greatest value below and the least above ``wanted``."""
    below, above = [v for v in values if 0 < v < wanted], [v for v in values if v > wanted]
    return " or ".join(str(v) for v in (*below[-1:], *above[:1]))


# ------------------------------------------------------------------------------------------- resume
# What a key's change means to a run that has already trained; the longest matching prefix decides,
# and the rest is free.
Change = Literal["refused", "noticed", "free"]
CHANGES: dict[str, Change] = {
    "run.seed": "refused",
    "tokenizer": "refused",
    "objective": "refused",
    "model": "refused",
    "model.attention": "free",
    "model.trust_remote_code": "free",
    "data.seq_len": "refused",
    "data.lanes": "refused",
    "data.block": "refused",  # the order of rows is made of these
    "data.stages": "noticed",
    # other data than was seen is found by its fingerprint; a moved folder is no other data
    "data.sources": "noticed",
    "data.cross_document": "noticed",
    # and what it is given: other examples than were seen are found by their fingerprint
    "task": "refused",
    "train": "noticed",
    "train.micro_batch": "free",
    "train.hang_timeout_s": "free",
    "optim": "noticed",
    "schedule": "noticed",
}


@dataclass(frozen=True)
class Difference:
    """One key whose value is not the one that the run directory was made with."""

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def resume_differences(
    old: TrainConfig, new: TrainConfig
) -> tuple[list[Difference], list[Difference]]:
    """Return what a resume of ``old`` as ``new`` must be refused for, and what is accepted with a
    notice.
    """
    by_kind: dict[Change, list[Difference]] = {"refused": [], "noticed": [], "free": []}
    for difference in differences(old, new):
        prefixes = [prefix for prefix in CHANGES if f"{difference.key}.".startswith(f"{prefix}.")]
        by_kind[CHANGES[max(prefixes, key=len)] if prefixes else "free"].append(difference)
    return by_kind["refused"], by_kind["noticed"]


def differences(
    old: Section | Mapping[str, object], new: Section | Mapping[str, object]
) -> list[Difference]:
    """Return every key whose value differs, in the order of the schema (of the mapping)."""
    before, after = (
        one.model_dump(mode="json", by_alias=True) if isinstance(one, Section) else one
        for one in (old, new)
    )
    return list(_differences(before, after, ""))


def _differences(old: object, new: object, key: str) -> Iterator[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{key}.{index}" if key else str(index))
    elif old != new:
        yield Difference(key, old, new)
