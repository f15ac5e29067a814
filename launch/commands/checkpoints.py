"""`hfscale checkpoints`: what a run has saved, why it is kept, and whether it is whole."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory; its job may be running.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare it with the manifest.")] = False,
    pin: Annotated[list[int] | None, typer.Option(metavar="STEP", help="Keep this checkpoint, whatever the config says.")] = None,
    unpin: Annotated[list[int] | None, typer.Option(metavar="STEP", help="No longer.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove now what nothing keeps; the newest good one always stays.")] = False,
) -> None:
    """List the checkpoints of RUN, oldest first, and why each is kept. With --verify the exit code is 1 if one is damaged.

    Examples: hfscale checkpoints runs/quickstart --verify; hfscale checkpoints runs/quickstart --pin 1000 --prune
    """
    from hfscale.checkpoint import layout
    from hfscale.reports.checkpoints import list_checkpoints, open_folder, rejected
    from hfscale.reports.checkpoints import prune as prune_run

    folder, _ = open_folder(run)
    for step, pinned in [*((step, True) for step in pin or ()), *((step, False) for step in unpin or ())]:
        layout.pin(folder, step, pinned=pinned)
    if prune:
        gone, free = prune_run(run)
        typer.echo(f"removed {', '.join(path.name for path in gone) or 'nothing'}; {free / 1e9:,.1f} GB free")
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
