"""`hfscale checkpoints`: what a run has saved, and whether it is whole."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare it with the manifest.")] = False,
) -> None:
    """List the checkpoints of RUN, oldest first. With --verify the exit code is 1 if one is damaged; nothing is moved or removed.

    Example: hfscale checkpoints runs/quickstart --verify
    """
    from hfscale.reports.checkpoints import list_checkpoints, rejected

    found = list_checkpoints(run, verify=verify)
    for saved in found:
        verdict = "" if saved.problems is None else "  damaged" if saved.problems else "  ok"
        typer.echo(saved.line + verdict)
        for problem in saved.problems or ():
            typer.echo(f"    {problem}")
    if not found:
        typer.echo(f"no checkpoints in {run} yet")
    for path in rejected(run):
        typer.echo(f"rejected earlier, kept for inspection: {path}")
    raise typer.Exit(1 if any(saved.problems for saved in found) else 0)
