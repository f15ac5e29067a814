"""`hfscale logs`: what a run says."""
from __future__ import annotations

import os
from typing import Annotated

import typer

from hfscale.errors import CheckpointError

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def logs(run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
         follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing what is added, until Ctrl-C.")] = False,
         lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 50) -> None:
    """Print the last lines of rank 0 and of the newest Slurm job; the other ranks' logs lie beside them.

    Example: hfscale logs runs/first -f
    """
    from launch.request import config_file

    folder = config_file(run).parent / "logs"
    jobs = sorted(folder.glob("slurm-*.log"), key=lambda file: file.stat().st_mtime)[-1:]
    files = [*jobs, *folder.glob("rank-0.log")]
    if not files:
        raise CheckpointError("this run has no log yet", where=folder, remedy=f"see where it is: hfscale status {run}")
    os.execvp("tail", ["tail", "-n", str(lines), *(["-F"] if follow else []), *map(str, files)])
