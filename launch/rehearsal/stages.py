"""What is done in a rehearsal, and what cannot be done here, with the reason."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.rehearsal.plan import (
    EVALUATION,
    EXPORT,
    EXPORTED,
    FAULTS,
    OTHER,
    OTHER_WORLD,
    STOP,
    TIME_LIMIT,
    Asked,
    Command,
    Fault,
    Looked,
    Plan,
)
from launch.rehearsal.shrink import Shrunk
from launch.rehearsal.where import Where

STAGES = (*FAULTS, OTHER_WORLD, EVALUATION, EXPORT)


def plan_of(
    config: TrainConfig,
    shrunk: Shrunk,
    where: Where,
    *,
    run_dir: Path,
    skipped: Collection[str],
    data: Looked | None,
) -> Plan:
    """Return the plan of a rehearsal of ``config`` in ``run_dir``; ``data`` has been looked at."""
    left_out = {name: "not asked for" for name in STAGES if name in skipped}
    left_out |= {**_impossible(config, where), **where.left_out}
    if isinstance(config, RunConfig) and not shrunk.scored:
        left_out[EVALUATION] = f"{config.objective.name} has no loss a token to score"
    others = 1 if where.ranks > 1 else 2
    home = run_dir.parent
    commands = {
        OTHER_WORLD: [config.verb, str(home / OTHER), "--procs", str(others)],
        EVALUATION: ["evaluate", str(run_dir)],
        EXPORT: ["export", str(run_dir), str(home / EXPORTED)],
    }
    faults = [Fault(name=name, step=step) for name, step in FAULTS.items() if name not in left_out]
    done_after = [
        Command(name=name, words=[*where.python, *words])
        for name, words in commands.items()
        if name not in left_out
    ]
    return Plan(
        launcher=where.launcher,
        ranks=where.ranks,
        gpus_per_node=where.gpus,
        whole=shrunk.whole,
        small=shrunk.small,
        asked=_asked(config),
        faults=faults,
        commands=done_after,
        left_out=left_out,
        cluster=dict(where.told),
        data=data,
        limit_s=where.limit_s,
        signal_s=where.signal_s,
        began=time.time(),
    )


def _impossible(config: TrainConfig, where: Where) -> dict[str, str]:
    """Return what cannot be done, and why."""
    left_out: dict[str, str] = {}
    if where.launcher != "slurm":
        left_out[TIME_LIMIT] = "only a job of Slurm has one: --launcher slurm"
    if where.ranks == 1:
        left_out[STOP] = "a rank alone has nobody who sees that it stands still"
        if where.gpus == 1:
            left_out[OTHER_WORLD] = "there is one GPU"
    if config.data.validation is None:
        left_out[EVALUATION] = "the config holds nothing out: data.validation"
    return left_out


def _asked(config: TrainConfig) -> Asked:
    cluster, checkpoint = config.cluster, config.checkpoint
    return Asked(
        signal_s=cluster.signal_s,
        time=cluster.time,
        every_minutes=checkpoint.every_minutes,
        every_steps=checkpoint.every_steps,
        keep_last=checkpoint.keep_last,
        nodes=cluster.nodes,
        root=str(_there(config.run.root)),
    )


def _there(folder: Path) -> Path:
    """Return the nearest folder that exists."""
    return next(one for one in (folder, *folder.parents) if one.is_dir())
