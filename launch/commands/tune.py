"""`hfscale tune`: what of a config is best on this machine, by trials of a few steps each. Nothing
of the user's is changed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hfscale.config.permission import grant
from hfscale.config.rules import solve_batch
from hfscale.dist.world import available_cores
from hfscale.errors import ConfigError, nearest
from launch.commands.runs import Overrides, Procs
from launch.job import Training
from launch.local import gpu_count
from launch.request import Request
from launch.trials import Trials
from launch.tuning import Part, Tuning, config_lines

PARTS = {
    "micro-batch": Tuning.micro_batch,
    "checkpointing": Tuning.checkpointing,
    "compile": Tuning.compile,
    "workers": Tuning.workers,
    "lr": Tuning.lr,
}
SHARE = 0.9  # of the memory that is free, for all ranks


def tune(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or a run directory.")
    ],
    overrides: Overrides = None,
    procs: Procs = None,
    only: Annotated[
        str, typer.Option(help=f"What to tune, with commas between: {','.join(PARTS)}.")
    ] = ",".join(PARTS),
    steps: Annotated[
        int, typer.Option(min=3, help="Of each trial; the test of learning rates takes ten times.")
    ] = 10,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="GIB",
            help="What a rank may take. Without it: its GPU, or its part of what is free.",
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the test of learning rates here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it for scripts.")] = False,
) -> None:
    """Find the micro-batch, checkpointing, compilation, workers and learning rate of CONFIG on this
    machine, by trials of a few steps each, and print the lines to paste.

    Nothing of yours is changed. What is not faster beyond the spread of its turns stays as it is.
    Examples: hfscale tune configs/pretrain/gpt2_small.yaml --procs 8; hfscale tune
    configs/pretrain/quickstart.yaml --only lr --png lr.png
    """
    from hfscale.checks.machine import free_memory
    from hfscale.tuning.rates import draw

    wanted = _parts(only)
    if png and (png.exists() or not png.absolute().parent.is_dir()):
        why = "exists already" if png.exists() else "would lie in a folder that is not there"
        remedy = "name another file"
        raise ConfigError(f"this file {why}", where="--png", value=str(png), remedy=remedy)
    grant(overrides or ())
    gpus = gpu_count()
    procs = procs or gpus or min(2, available_cores())
    limit = memory or (0.0 if gpus else SHARE * free_memory() / 2**30 / procs)
    with tempfile.TemporaryDirectory(prefix="hfscale-tune-") as home:
        trials = Trials(config, overrides or [], procs=procs, memory_gib=limit, home=Path(home))
        _refuse(trials, gpus=gpus > 0)
        tuning, parts = Tuning(trials, steps=steps), list[Part]()
        for name in wanted:
            parts.append(PARTS[name](tuning))
            if not as_json:
                typer.echo("\n".join([f"{name}", *(f"  {line}" for line in parts[-1].lines)]))
    if png and tuning.curve:
        draw(tuning.curve.rates, tuning.curve.losses, tuning.curve.found, png)
    lines = config_lines(tuning.chosen)
    if as_json:
        report = {part.name: part.figures for part in parts}
        typer.echo(json.dumps({"chosen": tuning.chosen, "config": lines, "parts": report}))
    elif lines:
        typer.echo("\n".join(["for the config:", *lines]))


def _refuse(trials: Trials, *, gpus: bool) -> None:
    """Return if the config can be tried at all.

    Raises:
        UserError: for the first thing that speaks against it.
    """
    train = trials.loaded.config.train
    solve_batch(train.global_batch, micro_batch=1, data_size=trials.procs)
    job = Training(Request(trials.source, tuple(trials.overrides)))
    job.run.read(device_type="cuda" if gpus else "cpu")


def _parts(only: str) -> list[str]:
    """Return what is to be tuned, in the order in which one thing decides the next.

    Raises:
        ConfigError: if something of it is unknown.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise ConfigError(
                "there is nothing of this name to tune",
                where="--only",
                value=name,
                remedy=nearest(name, PARTS),
            )
    if not names:
        raise ConfigError(
            "nothing is to be tuned", where="--only", value=only, remedy=", ".join(PARTS)
        )
    return [name for name in PARTS if name in names]
