"""The build order of a training job, on one screen: data, objective, model, engine, checkpoints, stream, loop.

Each part is built from the config and from parts above it, and from nothing below.
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfscale.checkpoint.manager import CheckpointManager, verify_together
from hfscale.checkpoint.pretrained import load_pretrained
from hfscale.checkpoint.weights import open_weights
from hfscale.config.rules import solve_batch, total_steps
from hfscale.config.schema import RunConfig
from hfscale.dist.agree import from_rank_0
from hfscale.dist.group import device_name
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World, allocation
from hfscale.engine.engine import Engine, construction, gathered
from hfscale.engine.schedule import learning_rate
from hfscale.jobs.check import model_needs, open_rows, pretrained_folder, warn_of_tokenizer
from hfscale.log import logger
from hfscale.models.build import build_model
from hfscale.models.flops import flops_per_token, peak_flops
from hfscale.monitor.throughput import Throughput
from hfscale.monitor.writers import MetricsLog
from hfscale.objectives.base import Objective, Setting, load_objective
from hfscale.stream.loader import EvaluationRows, Stream, StreamState
from hfscale.stream.mixture import Mixture, kept_manifest, open_mixture
from hfscale.stream.text import HeldOutText, TextRows, open_encoders
from hfscale.tokenizer import load_tokenizer, tokenizer_digest
from hfscale.training.evaluator import Evaluator
from hfscale.training.loop import Trainer, TrainState


def build_trainer(config: RunConfig, world: World, device: torch.device, stop: StopRequest | None = None) -> Trainer:
    """Return the trainer of ``config``, resumed from the run's newest good checkpoint if there is one.

    Raises:
        UserError: for anything in the config, the data or the checkpoints that cannot be used together.
    """
    data, train = config.data, config.train
    batch = solve_batch(train.global_batch, micro_batch=train.micro_batch, world_size=world.world_size)
    logger.info(batch.equation)

    tokenizer = load_tokenizer(config.tokenizer.path)
    parts = [open_rows(source.shards, config, tokenizer) for source in data.sources]
    folder = from_rank_0(pretrained_folder(config))  # its run may save at this moment
    model = build(config, tokenizer, device, folder)
    objective = load_objective(config.objective, Setting(
        seq_len=data.seq_len, micro_batch=train.micro_batch, seed=config.run.seed, cross_document=data.cross_document,
        sources=len(parts), tokenizer=tokenizer, model_config=model.config))

    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ds_numel: of the whole, at ZeRO 3
    flops = flops_per_token(model.config, seq_len=data.seq_len, parameters=parameters)
    engine = Engine.create(model, config=config, device=device)
    with engine.eval_mode():
        objective.check(engine, device=device)

    checkpoints = CheckpointManager(config.run_dir / "checkpoints", config=config.checkpoint, rank=world.rank, world_size=world.world_size)
    saved = checkpoints.load_latest(engine)
    origin = saved.get("pretrained") if saved else folder and str(folder)
    if saved is None and folder is not None:
        logger.info(f"starting from the weights of {folder}")
        warn_of_tokenizer(folder, tokenizer)
        load_pretrained(engine, open_weights(folder, check=verify_together))
    rows, order = open_mixture(config, parts, saved=saved)
    for part in parts if world.rank == 0 else ():
        part.manifest.save(kept_manifest(config.run_dir, part.fingerprint))
    position = StreamState.from_dict(saved["stream"]) if saved else None
    if order.raw:
        rows = TextRows(rows, order, open_encoders(config, tokenizer, local_ranks=world.local_world_size), state=position,
                        global_batch=train.global_batch, rank=world.rank, world_size=world.world_size)
    stream = Stream(rows, order, global_batch=train.global_batch, micro_batch=train.micro_batch, rank=world.rank,
                    world_size=world.world_size, state=position, prefetch_steps=data.prefetch_steps,
                    with_documents=not data.cross_document, pin_memory=device.type == "cuda")
    state = TrainState(saved["step"], saved["tokens_seen"], saved.get("skipped_rows", 0)) if saved else TrainState()
    steps = total_steps(train, rows=order.rows, seq_len=data.seq_len)
    nothing_left = "; nothing is left to do, train.steps says how far" if state.step >= steps else ""
    logger.info(f"resumed at step {state.step} of {steps}{nothing_left}" if saved else f"starting at step 0 of {steps}")

    peak = peak_flops(device, precision=config.engine.precision)
    return Trainer(
        engine=engine, stream=stream, objective=objective, checkpoints=checkpoints, state=state, stop=(stop or StopRequest()).listen(),
        throughput=Throughput(tokens_per_step=train.global_batch * data.seq_len, flops_per_token=flops,
                              peak_flops=peak and peak * world.world_size),
        learning_rate=lambda step: learning_rate(step, peak=config.optim.lr, total_steps=steps, schedule=config.schedule),
        describe=describe(config, order, tokenizer, world, device) | {"pretrained": origin},
        total_steps=steps, sources=order.names, seed=config.run.seed, rank=world.rank, world_size=world.world_size,
        metrics_every=config.metrics.every_steps, max_skipped=data.max_skipped,
        warned_s=config.cluster.signal_s if allocation() and world.rank == 0 else None,
        **validation(config, objective, tokenizer, world),
        log=MetricsLog(config.run_dir, first_step=state.step + 1, total_steps=steps,
                       tensorboard=config.metrics.tensorboard) if world.rank == 0 else None)


def build(config: RunConfig, tokenizer: PreTrainedTokenizerFast, device: torch.device, pretrained: Path | None) -> PreTrainedModel:
    """Return the model with its first weights, partitioned where the ZeRO stage says so; ``pretrained`` is where its config lies."""
    objective = load_objective(config.objective, Setting(seq_len=config.data.seq_len, tokenizer=tokenizer))

    def gather(params: Sequence[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        return gathered(params, modify=True)

    return build_model(auto_model=objective.auto_model, seed=config.run.seed, gather=gather,
                       context=lambda: construction(config, device_type=device.type), **model_needs(config, tokenizer, pretrained))


def validation(config: RunConfig, objective: Objective, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    """Return the trainer's parts for held-out loss, or nothing where the config asks for none."""
    held_out = config.data.validation
    if held_out is None:
        return {}
    rows = open_rows(held_out.shards, config, tokenizer)
    if rows.raw:
        rows = HeldOutText(rows, open_encoders(config, tokenizer, local_ranks=world.local_world_size), count=held_out.rows)
    scored = EvaluationRows(rows, count=held_out.rows, micro_batch=config.train.micro_batch, rank=world.rank, world_size=world.world_size,
                            with_documents=not config.data.cross_document)
    return {"evaluator": Evaluator(objective, scored), "validate_every": held_out.every_steps}


def describe(config: RunConfig, order: Mixture, tokenizer: PreTrainedTokenizerFast, world: World, device: torch.device) -> dict[str, Any]:
    """Return what every checkpoint of this run says about itself, beside its position."""
    return {"device": device_name(device), "world_size": world.world_size, "zero_stage": config.engine.zero_stage,
            "precision": config.engine.precision,
            "data_fingerprint": order.fingerprint, "data": dict(order.fingerprints), "tokenizer_digest": tokenizer_digest(tokenizer),
            "schedule": config.schedule.model_dump(),
            "rng": "torch is seeded from blake2b(seed/step/rank/micro-batch) before each forward",
            "versions": {package: version(package) for package in ("torch", "deepspeed", "transformers")}}
