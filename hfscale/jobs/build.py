"""The build order of a training job, on one screen: data, objective or task, model, engine, checkpoints, stream, loop.

Each part is built from the config and from parts above it, and from nothing below.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.pretrained import labels_of, load_pretrained, match, tell
from hfscale.checkpoint.weights import open_weights, verify_together
from hfscale.config.rules import solve_batch, total_steps
from hfscale.config.schema import TrainConfig
from hfscale.dist.agree import from_rank_0, same_on_all_ranks
from hfscale.dist.group import device_name
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World, allocation
from hfscale.engine.engine import Engine, construction, gathered
from hfscale.engine.schedule import learning_rate
from hfscale.jobs.adapters import Beside
from hfscale.jobs.material import ExampleMaterial, TokenMaterial, open_material
from hfscale.jobs.origin import model_needs, pretrained_folder, warn_of_tokenizer
from hfscale.log import logger
from hfscale.models.build import build_model
from hfscale.models.flops import flops_per_token, peak_flops
from hfscale.monitor.throughput import Throughput
from hfscale.monitor.writers import MetricsLog
from hfscale.tokenizer import tokenizer_digest
from hfscale.training.loop import Trainer, TrainState


def build_trainer(
    config: TrainConfig, world: World, device: torch.device, stop: StopRequest | None = None
) -> Trainer:
    """Return the trainer of ``config``, resumed from the run's newest good checkpoint if there is one.

    Raises:
        UserError: for anything in the config, the data or the checkpoints that cannot be used together.
    """
    data, train = config.data, config.train
    batch = solve_batch(
        train.global_batch, micro_batch=train.micro_batch, world_size=world.world_size
    )
    logger.info(batch.equation)

    folder = from_rank_0(pretrained_folder(config))  # its run may save at this moment
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
    objective = material.objective(model.config)
    beside = (
        Beside(model, config.model.lora, folder, rank=world.rank)
        if folder and config.model.lora
        else None
    )

    flops = flops_per_token(model, seq_len=data.seq_len)
    engine = Engine.create(model, config=config, device=device)
    with engine.eval_mode():
        objective.check(engine, device=device)

    checkpoints = CheckpointManager(
        config.run_dir / "checkpoints",
        config=config.checkpoint,
        rank=world.rank,
        world_size=world.world_size,
    )
    saved = checkpoints.load_latest(engine)
    origin = saved.get("pretrained") if saved else folder and str(folder)
    if saved and beside:
        beside.check(saved)
    if folder is not None and (saved is None or beside):
        logger.info(f"{'beside' if beside else 'starting from'} the weights of {folder}")
        warn_of_tokenizer(folder, material.tokenizer)
        reader = beside.reader if beside else open_weights(folder, check=verify_together)
        load_pretrained(
            engine,
            reader,
            beside.match
            if beside
            else tell(match(engine.module, reader, labels=labels_of(folder)), engine.module),
        )
    stream = material.open(objective, saved=saved, pin_memory=device.type == "cuda")
    state = (
        TrainState(saved["step"], saved["tokens_seen"], saved.get("skipped_rows", 0))
        if saved
        else TrainState()
    )
    steps = total_steps(train, rows=material.rows, seq_len=data.seq_len)
    nothing_left = (
        "; nothing is left to do, train.steps (or epochs, tokens) says how far"
        if state.step >= steps
        else ""
    )
    logger.info(
        f"resumed at step {state.step} of {steps}{nothing_left}"
        if saved
        else f"starting at step 0 of {steps}"
    )

    peak = peak_flops(device, precision=config.engine.precision)
    return Trainer(
        engine=engine,
        stream=stream,
        objective=objective,
        checkpoints=checkpoints,
        state=state,
        stop=(stop or StopRequest()).listen(),
        throughput=Throughput(flops_per_token=flops, peak_flops=peak and peak * world.world_size),
        learning_rate=lambda step: learning_rate(
            step, peak=config.optim.lr, total_steps=steps, schedule=config.schedule
        ),
        describe=describe(config, material, world, device)
        | {"pretrained": origin}
        | (beside.about if beside else {}),
        total_steps=steps,
        sources=material.names,
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.world_size,
        metrics_every=config.metrics.every_steps,
        max_skipped=getattr(data, "max_skipped", 0.0),
        patience=train.patience,
        warned_s=config.cluster.signal_s if allocation() and world.rank == 0 else None,
        **material.validation(objective),
        log=MetricsLog(
            config.run_dir,
            first_step=state.step + 1,
            total_steps=steps,
            tensorboard=config.metrics.tensorboard,
        )
        if world.rank == 0
        else None,
    )


def describe(
    config: TrainConfig,
    material: TokenMaterial | ExampleMaterial,
    world: World,
    device: torch.device,
) -> dict[str, Any]:
    """Return what every checkpoint of this run says about itself, beside its position."""
    return {
        "device": device_name(device),
        "world_size": world.world_size,
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
