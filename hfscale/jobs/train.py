"""Pretraining and fine-tuning: the stream drives objective or task under the engine until the steps
are done or a stop is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hfscale.config.schema import TrainConfig
from hfscale.dist import group
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World
from hfscale.jobs.environment import record_ranks
from hfscale.monitor.heartbeat import beat
from hfscale.monitor.phases import IMPORTS, PHASES, START
from hfscale.run.run import Run
from hfscale.training.observers.base import Observer


def run(config: TrainConfig, world: World, stop: StopRequest) -> bool:
    """Return True when done, False when stopped on request and saved."""
    PHASES.enter(START + "group")
    device = group.start(world)
    done = train(config, world, stop, device=device)
    group.shutdown()
    return done


def train(
    config: TrainConfig,
    world: World,
    stop: StopRequest,
    *,
    device: torch.device,
    watched_by: Sequence[Observer] = (),
) -> bool:
    """Return as ``run``, in a group that is up; ``watched_by`` look at each step last."""
    PHASES.enter(IMPORTS)  # DeepSpeed and transformers come with what is live
    trainer = Run(config, world).live(device, stop)
    trainer.observers = [*trainer.observers, *watched_by]
    record_ranks(config.run_dir, world, device, described=trainer.describe)
    done = trainer.run()
    beat("shutdown")
    trainer.close()
    return done
