"""The build order of a run that trains, on one screen: data, model, objective or task, engine,
checkpoints, stream, loop, and the observers that look at it.

Each part is built from the run and from parts above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from hfscale import run_files
from hfscale.checkpoint.base import check_base
from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.pretrained import labels_of, load_pretrained, match, tell
from hfscale.checkpoint.state import CheckpointState
from hfscale.checkpoint.weights import open_weights, verify_together
from hfscale.config.rules import Length, run_length, solve_batch, warmed_rows
from hfscale.config.schema import TrainConfig
from hfscale.dist.agree import from_rank_0, same_on_all_ranks
from hfscale.dist.group import device_name
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World, allocation
from hfscale.engine.engine import Engine
from hfscale.engine.schedule import learning_rate
from hfscale.engine.start import construction, gathered
from hfscale.log import logger
from hfscale.models.build import accepted, build_model
from hfscale.models.flops import flops_per_token, peak_flops
from hfscale.monitor.fence import Fence
from hfscale.monitor.lines import Lines
from hfscale.monitor.metrics_log import MetricsLog
from hfscale.monitor.phases import PHASES, START
from hfscale.monitor.throughput import Throughput
from hfscale.run.about import about_run
from hfscale.run.beside import Beside
from hfscale.run.data import OpenData
from hfscale.run.gradient_proof import prove_gradient
from hfscale.run.head import choose_head
from hfscale.run.health import health_of, incidents_of, leave_out
from hfscale.run.model import check_live
from hfscale.run.origin import generate_as
from hfscale.run.shape import say_notices
from hfscale.run.trial import try_out
from hfscale.training.accounting import Accounting
from hfscale.training.loop import Trainer, TrainState
from hfscale.training.observers.base import Observer
from hfscale.training.observers.best import KeepBest
from hfscale.training.observers.details import Details
from hfscale.training.observers.goodput import Goodput
from hfscale.training.observers.journal import Journal
from hfscale.training.observers.log import Figures, Log
from hfscale.training.observers.profile import Profile
from hfscale.training.observers.replicas import Replicas
from hfscale.training.observers.sampling import Sampling
from hfscale.training.observers.validate import Validate
from hfscale.training.sampler import sampler_class

if TYPE_CHECKING:
    from hfscale.run.run import Run


def live(run: Run, device: torch.device, stop: StopRequest | None) -> Trainer:
    """Return the trainer of ``run``, as ``Run.live``."""
    config, world, shape = run.config, run.world, run.shape
    global_batch, micro_batch = config.train.global_batch, config.train.micro_batch
    batch = solve_batch(global_batch, micro_batch=micro_batch, data_size=world.data.size)
    logger.info(batch.equation)
    PHASES.enter(START + "data")
    fence = fence_of(config, world)
    shape.folder = agreed(shape.folder)
    data = shape.data
    same_on_all_ranks({"tokenizer.path": data.tokenizer_digest, **data.digests()})

    PHASES.enter(START + "model")
    model = model_of(run, device)
    objective = data.objective(model.config)
    beside = None
    if shape.folder and config.model.lora:
        beside = Beside(model, config.model.lora, shape.folder, rank=world.all.rank)
    throughput = throughput_of(model, config, world, device)
    PHASES.enter(START + "engine")
    engine = Engine.create(model, config=config, device=device)
    PHASES.enter(START + "check")
    with engine.eval_mode():
        accepted(partial(choose_head, objective, engine, config), config.model)
        check_live(objective, engine, device=device, said=config.model)

    PHASES.enter(START + "weights")
    folder = config.run_dir / run_files.CHECKPOINTS
    checkpoints = CheckpointManager(folder, config=config.checkpoint, place=world.all, fence=fence)
    saved = checkpoints.load_latest(engine)
    begin(run, engine, beside, saved)
    PHASES.enter(START + "data")
    opened = data.open(objective, saved=saved, pin_memory=device.type == "cuda")
    found = incidents_of(config)
    leave_out(opened, saved, found)
    length, warmed = how_long(run, opened, saved)
    about = describe(run, opened, device) | {"warmed_rows": warmed}
    about["pretrained"] = saved.pretrained if saved else shape.folder and str(shape.folder)

    trainer = Trainer(
        engine=engine,
        stream=opened.stream,
        accounting=Accounting(objective),
        checkpoints=checkpoints,
        state=TrainState.after(saved),
        stop=(stop or StopRequest()).listen(),
        throughput=throughput,
        learning_rate=partial(
            learning_rate, peak=config.optim.lr, length=length, schedule=config.schedule
        ),
        describe=about | (beside.about if beside else {}),
        total_steps=length.steps,
        seed=config.run.seed,
        max_skipped=getattr(config.data, "max_skipped", 0.0),
        health=health_of(config, saved, found),
    )
    trainer.observers = [*observers(run, opened, trainer, fence=fence, saved=saved)]
    look_before(trainer, config, new=saved is None)
    return trainer


def look_before(trainer: Trainer, config: TrainConfig, *, new: bool) -> None:
    """Return if what is ``new`` can be saved and exported, and what is left to do has a gradient
    that is right.
    """
    if new:
        PHASES.enter(START + "trial")
        try_out(trainer, config)
    if config.engine.prove and trainer.state.step < trainer.total_steps:
        PHASES.enter(START + "proof")
        prove_gradient(trainer, config)


def agreed(folder: Path | None) -> Path | None:
    """Return the folder of rank 0, which every rank begins with: its run may save at this
    moment.
    """
    place = from_rank_0(folder and str(folder))
    return Path(place) if place else None


def model_of(run: Run, device: torch.device) -> PreTrainedModel:
    """Return the model with its first weights, which generates as its source says."""
    model = build_model(
        auto_model=run.shape.objective.auto_model,
        seed=run.config.run.seed,
        gather=partial(gathered, modify=True),
        context=partial(construction, run.config, device_type=device.type),
        **run.shape.needs,
    )
    generate_as(model, run.shape.folder)
    return model


def throughput_of(
    model: PreTrainedModel, config: TrainConfig, world: World, device: torch.device
) -> Throughput:
    """Return what measures how fast ``model`` is trained, and which part of all devices that
    takes.
    """
    flops = flops_per_token(model, seq_len=config.data.seq_len)
    peak = peak_flops(device, precision=config.engine.precision)
    return Throughput(flops_per_token=flops, peak_flops=peak and peak * world.all.size)


def observers(
    run: Run,
    opened: OpenData,
    trainer: Trainer,
    *,
    fence: Fence | None,
    saved: CheckpointState | None,
) -> Iterator[Observer]:
    """Yield what looks at each step of ``trainer``, in this order; rank 0 alone writes the log."""
    config, log = run.config, None
    if run.world.all.rank == 0:
        log = MetricsLog(
            about_run(config, first_step=trainer.state.step + 1),
            total_steps=trainer.total_steps,
            writers=config.metrics.drawn_by,
            fence=fence,
        )
    yield Figures(
        engine=trainer.engine,
        stream=trainer.stream,
        accounting=trainer.accounting,
        checkpoints=trainer.checkpoints,
        throughput=trainer.throughput,
        every_steps=config.metrics.every_steps,
        sources=opened.names,
        warned_s=config.cluster.signal_s if log and allocation() else None,
    )
    if opened.evaluator:
        steps = trainer.total_steps
        yield Validate(trainer.engine, opened.evaluator, opened.validate_every, steps)
    if config.metrics.samples:
        yield sampling(config, opened, trainer, log=log, fence=fence)
    yield Details(
        engine=trainer.engine, throughput=trainer.throughput, clip_norm=config.optim.clip_norm
    )
    if log:
        trainer.health.write = Journal(
            config.run_dir,
            attempt=log.attempt,
            fence=fence,
            rows_of=trainer.rows_of,
            places=opened.stream.places,
        ).write
    yield trainer.health
    if every_steps := config.health.replicas_every_steps:
        first = trainer.state.step
        yield Replicas(trainer.engine, trainer.health, every_steps=every_steps, good=first)
    if log:
        yield Log(log)
    if best := config.checkpoint.keep_best:
        before = saved.best if saved else None
        yield KeepBest(best, patience=config.train.patience, saved=before)
    yield Profile(
        trainer.engine,
        run_dir=config.run_dir,
        attempt=run.world.attempt or (log.attempt if log else 0),
        plan=config.metrics.profile,
    )
    if log:
        yield Goodput(config.run_dir, step=trainer.state.step, fence=fence)


def sampling(
    config: TrainConfig,
    opened: OpenData,
    trainer: Trainer,
    *,
    log: MetricsLog | None,
    fence: Fence | None,
) -> Sampling:
    """Return what lets the model of ``trainer`` write texts; rank 0, with the log, keeps them."""
    samples, objective = config.metrics.samples, trainer.objective
    assert samples is not None
    sampler = sampler_class(objective, samples)(objective, samples, opened.shown)
    return Sampling(
        trainer.engine,
        sampler,
        every_steps=opened.validate_every * samples.every_validations,
        total_steps=trainer.total_steps,
        log=log,
        lines=Lines(config.run_dir / run_files.SAMPLES, fence=fence) if log else None,
    )


def fence_of(config: TrainConfig, world: World) -> Fence | None:
    """Return which attempt of the run this is, as rank 0 knows; None where nobody counts them."""
    attempt = from_rank_0(world.attempt)
    return Fence(config.run_dir, attempt) if attempt else None


def how_long(run: Run, opened: OpenData, saved: CheckpointState | None) -> tuple[Length, int]:
    """Return the length of a run that goes on from ``saved``, and after how many rows its warm-up
    ended, or will. The log says both what is probably not meant and where the run goes on.
    """
    config, rows, step = run.config, run.shape.data.rows, saved.step if saved else 0
    train, warmup_steps = config.train, config.schedule.warmup_steps
    consumed_rows = opened.stream.state().consumed_rows
    same = saved is not None and saved.schedule.get("warmup_steps") == warmup_steps
    warmed = warmed_rows(
        warmup_steps,
        global_batch=train.global_batch,
        step=step,
        consumed_rows=consumed_rows,
        saved=saved.warmed_rows if saved and same else None,
    )
    length = run_length(
        train, rows=rows, seq_len=config.data.seq_len, step=step, consumed_rows=consumed_rows
    )
    if train.steps is None:  # else the schedule is one of steps, whatever their size
        length = replace(length, warmed=warmed / train.global_batch)
    if run.world.all.rank == 0:
        say_notices(config, rows=rows, length=length)
    if saved is None:
        logger.info(f"starting at step 0 of {length.steps}")
    else:
        done = "; nothing is left to do, train.steps (or epochs, tokens) says how far"
        left = done if step >= length.steps else ""
        logger.info(f"resumed at step {step} of {length.steps}{left}")
    return length, warmed


def begin(run: Run, engine: Engine, beside: Beside | None, saved: CheckpointState | None) -> None:
    """Give the engine the pretrained weights that are not in its checkpoint: all of the run's
    source, or those that adapters stand beside.
    """
    folder = run.shape.folder
    if saved and saved.adapters and beside:
        check_base(saved.adapters, where=run.config.run_dir)
    if folder is None or (saved and not beside):
        return
    logger.info(f"{'beside' if beside else 'starting from'} the weights of {folder}")
    run.shape.warn_of_tokenizer(folder)
    if beside:
        load_pretrained(engine, beside.reader, beside.match)
        return
    reader = open_weights(folder, check=verify_together)
    filling = match(engine.module, reader, labels=labels_of(folder))
    load_pretrained(engine, reader, tell(filling, engine.module))


def describe(run: Run, opened: OpenData, device: torch.device) -> dict[str, object]:
    """Return what every checkpoint of this run says about itself, beside its position."""
    config, packages = run.config, ("torch", "deepspeed", "transformers")
    return {
        "device": device_name(device),
        "world_size": run.world.all.size,
        "zero_stage": config.engine.zero_stage,
        "precision": config.engine.precision,
        "optimizer": config.optim.name,
        **opened.about,
        "tokenizer_digest": run.shape.data.tokenizer_digest,
        "schedule": config.schedule.model_dump(),
        "rng": "torch is seeded from blake2b(seed/step/rank/micro-batch) before each forward",
        "versions": {package: version(package) for package in packages},
    }
