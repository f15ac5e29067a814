"""The build order of a training job, on one screen: data, objective or task, model, engine,
checkpoints, stream, loop.

Each part is built from the config and from parts above it, and from nothing below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

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
from hfscale.engine.engine import Engine, construction, gathered
from hfscale.engine.schedule import learning_rate
from hfscale.jobs.adapters import Beside
from hfscale.jobs.check import say_notices
from hfscale.jobs.material import ExampleMaterial, TokenMaterial, open_material
from hfscale.jobs.rehearsal import rehearse
from hfscale.log import logger
from hfscale.models.build import build_model
from hfscale.models.flops import flops_per_token, peak_flops
from hfscale.monitor.fence import Fence
from hfscale.monitor.throughput import Throughput
from hfscale.monitor.writers import MetricsLog
from hfscale.run.model import check_live
from hfscale.run.origin import generate_as, model_needs, pretrained_folder, warn_of_tokenizer
from hfscale.tokenizer import tokenizer_digest
from hfscale.training.loop import Trainer, TrainState
from hfscale.training.observers.base import Observer
from hfscale.training.observers.best import KeepBest
from hfscale.training.observers.log import Figures, Log
from hfscale.training.observers.validate import Validate


def build_trainer(
    config: TrainConfig, world: World, device: torch.device, stop: StopRequest | None = None
) -> Trainer:
    """Return the trainer of ``config``, resumed from the run's newest good checkpoint if there is
    one.

    Raises:
        UserError: for anything in the config, the data or the checkpoints that cannot be used
            together.
    """
    data, train = config.data, config.train
    batch = solve_batch(
        train.global_batch, micro_batch=train.micro_batch, data_size=world.data.size
    )
    logger.info(batch.equation)
    fence = fence_of(config, world)

    found = pretrained_folder(config)
    place = from_rank_0(found and str(found))  # its run may save at this moment
    folder = place and Path(place)
    material = open_material(config, world, folder)
    same_on_all_ranks(
        {"tokenizer.path": tokenizer_digest(material.tokenizer), **material.digests()}
    )
    model = build_model(
        auto_model=material.objective().auto_model,
        seed=config.run.seed,
        gather=partial(gathered, modify=True),
        context=partial(construction, config, device_type=device.type),
        **model_needs(config, material.tokenizer, folder, also=material.needs),
    )
    generate_as(model, folder)
    objective = material.objective(model.config)
    beside = (
        Beside(model, config.model.lora, folder, rank=world.all.rank)
        if folder and config.model.lora
        else None
    )

    flops = flops_per_token(model, seq_len=data.seq_len)
    engine = Engine.create(model, config=config, device=device)
    with engine.eval_mode():
        check_live(objective, engine, device=device, said=config.model)

    checkpoints = CheckpointManager(
        config.run_dir / run_files.CHECKPOINTS,
        config=config.checkpoint,
        place=world.all,
        fence=fence,
    )
    saved = checkpoints.load_latest(engine)
    begin(engine, folder, beside, material.tokenizer, saved=saved, run_dir=config.run_dir)
    origin = saved.pretrained if saved else folder and str(folder)
    stream = material.open(objective, saved=saved, pin_memory=device.type == "cuda")
    state = TrainState()
    if saved:
        state = TrainState(saved.step, saved.tokens_seen, saved.skipped_rows)
    length, warmed = how_long(
        config, saved, rows=material.rows, consumed_rows=stream.state().consumed_rows
    )
    steps = length.steps
    if world.all.rank == 0:
        say_notices(config, rows=material.rows, length=length)
    say_where(state, steps, saved=saved is not None)

    peak = peak_flops(device, precision=config.engine.precision)
    trainer = Trainer(
        engine=engine,
        stream=stream,
        objective=objective,
        checkpoints=checkpoints,
        state=state,
        stop=(stop or StopRequest()).listen(),
        throughput=Throughput(flops_per_token=flops, peak_flops=peak and peak * world.all.size),
        learning_rate=lambda step: learning_rate(
            step, peak=config.optim.lr, length=length, schedule=config.schedule
        ),
        describe=describe(config, material, world, device)
        | {"pretrained": origin, "warmed_rows": warmed}
        | (beside.about if beside else {}),
        total_steps=steps,
        seed=config.run.seed,
        max_skipped=getattr(data, "max_skipped", 0.0),
    )
    log = None
    if world.all.rank == 0:
        log = MetricsLog(
            config.run_dir,
            first_step=state.step + 1,
            total_steps=steps,
            tensorboard=config.metrics.tensorboard,
            fence=fence,
        )
    trainer.observers = [*observers(config, material, trainer, log=log, saved=saved)]
    if saved is None:
        rehearse(trainer, config)
    return trainer


def observers(
    config: TrainConfig,
    material: TokenMaterial | ExampleMaterial,
    trainer: Trainer,
    *,
    log: MetricsLog | None,
    saved: CheckpointState | None,
) -> Iterator[Observer]:
    """Yield what looks at each step of ``trainer``, in this order; ``log`` on rank 0 only."""
    yield Figures(
        engine=trainer.engine,
        stream=trainer.stream,
        objective=trainer.objective,
        checkpoints=trainer.checkpoints,
        throughput=trainer.throughput,
        every_steps=config.metrics.every_steps,
        sources=material.names,
        warned_s=config.cluster.signal_s if log and allocation() else None,
    )
    if validation := material.validation(trainer.objective):
        evaluator, every_steps = validation
        yield Validate(trainer.engine, evaluator, every_steps, trainer.total_steps)
    if log:
        yield Log(log)
    if best := config.checkpoint.keep_best:
        before = saved.best if saved else None
        yield KeepBest(best, patience=config.train.patience, saved=before)


def say_where(state: TrainState, steps: int, *, saved: bool) -> None:
    """Log where the run begins, or goes on."""
    if not saved:
        logger.info(f"starting at step 0 of {steps}")
        return
    left = ""
    if state.step >= steps:
        left = "; nothing is left to do, train.steps (or epochs, tokens) says how far"
    logger.info(f"resumed at step {state.step} of {steps}{left}")


def fence_of(config: TrainConfig, world: World) -> Fence | None:
    """Return which attempt of the run this is, as rank 0 knows; None where nobody counts them."""
    attempt = from_rank_0(world.attempt)
    return Fence(config.run_dir, attempt) if attempt else None


def how_long(
    config: TrainConfig, saved: CheckpointState | None, *, rows: int, consumed_rows: int
) -> tuple[Length, int]:
    """Return the length of a run that goes on from ``saved``, and after how many rows its warm-up
    ended, or will.
    """
    train, warmup_steps = config.train, config.schedule.warmup_steps
    step = saved.step if saved else 0
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
    return length, warmed


def begin(
    engine: Engine,
    folder: Path | None,
    beside: Beside | None,
    tokenizer: PreTrainedTokenizerFast,
    *,
    saved: CheckpointState | None,
    run_dir: Path,
) -> None:
    """Give the engine the pretrained weights that are not in its checkpoint: all of ``folder``, or
    those adapters stand beside.
    """
    if saved and saved.adapters and beside:
        check_base(saved.adapters, where=run_dir)
    if folder is None or (saved and not beside):
        return
    logger.info(f"{'beside' if beside else 'starting from'} the weights of {folder}")
    warn_of_tokenizer(folder, tokenizer)
    if beside:
        load_pretrained(engine, beside.reader, beside.match)
        return
    reader = open_weights(folder, check=verify_together)
    found = match(engine.module, reader, labels=labels_of(folder))
    load_pretrained(engine, reader, tell(found, engine.module))


def describe(
    config: TrainConfig,
    material: TokenMaterial | ExampleMaterial,
    world: World,
    device: torch.device,
) -> dict[str, Any]:
    """Return what every checkpoint of this run says about itself, beside its position."""
    return {
        "device": device_name(device),
        "world_size": world.all.size,
        "zero_stage": config.engine.zero_stage,
        "precision": config.engine.precision,
        **material.describe(),
        "tokenizer_digest": tokenizer_digest(material.tokenizer),
        "schedule": config.schedule.model_dump(),
        "rng": "torch is seeded from blake2b(seed/step/rank/micro-batch) before each forward",
        "versions": {
            package: version(package) for package in ("torch", "deepspeed", "transformers")
        },
    }
