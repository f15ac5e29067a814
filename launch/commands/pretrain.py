"""`hfscale pretrain`: from a config to a trained run, or on with a run that was stopped."""
from __future__ import annotations

from typing import Annotated

import typer


def pretrain(
    config_or_run: Annotated[str, typer.Argument(metavar="CONFIG_OR_RUN", help="A YAML file, or a run directory to go on with.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value...", help="Dotted overrides: train.steps=100 optim.lr=3e-4",
                                                          show_default=False)] = None,
    launcher: Annotated[str, typer.Option(help="local: processes here; slurm: a job; debug: one process, tiny.")] = "local",
    procs: Annotated[int | None, typer.Option(min=1, help="Ranks. Without it: one a GPU, or 2 on the CPU.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where the ranks meet. Without it: a free one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print what would run, write nothing.")] = False,
) -> None:
    """Train from CONFIG in its run directory, run.root/run.name. The same command again goes on where it stopped.

    Examples:
    hfscale pretrain configs/pretrain/gpt2_small.yaml run.name=first --procs 8;
    hfscale pretrain runs/first train.steps=200000
    """
    from hfscale.registry import load_plugin
    from launch.request import LAUNCHERS, Request

    request = Request(config_or_run, tuple(overrides or ()), procs=procs, port=port, dry_run=dry_run)
    raise typer.Exit(load_plugin("launcher", LAUNCHERS, launcher)(request))
