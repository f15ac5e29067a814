"""`hfscale incident`: what was wrong with a run, and which documents of a step are to blame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfscale.errors import shown
from launch.commands.runs import Permissions, permit

if TYPE_CHECKING:
    from hfscale.reports.incident import Suspect

LISTED = 5  # documents by each measure
SHOWN = 400  # characters of a text


def incident(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    number: Annotated[
        int | None,
        typer.Argument(metavar="N", help="Which incident, as listed.", show_default=False),
    ] = None,
    permissions: Permissions = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print each text whole, not its first 400 characters.")
    ] = False,
) -> None:
    """List the incidents of RUN; with N run the rows of that step again, each alone, with the
    weights of the checkpoint before, and print the documents with the largest gradients and the
    highest losses. On a GPU if there is one.

    Examples: hfscale incident runs/first; hfscale incident runs/first 2
    """
    from hfscale.reports.incident import listed, pick, rerun
    from launch.request import training_run

    permit(permissions)
    run_dir = training_run(run)
    if number is None:
        for line in listed(run_dir) or [f"{run} had no incidents"]:
            typer.echo(shown(line))
        return
    one = pick(run_dir, number)
    typer.echo(
        shown(f"incident {number}: step {one.step:,}, {one.kind}, {one.decision}: {one.text}")
    )
    again = rerun(run_dir, step=one.step, rows_of=one.rows)
    typer.echo(
        f"{again.rows:,} rows, each alone, with the weights of {again.checkpoint}; the gradient of "
        f"all has norm {again.grad_norm:.4g}"
    )
    typer.echo("largest parts of it (norm, and what is left without):")
    _print(again.by_gradient()[:LISTED], full=full)
    typer.echo("highest losses:")
    _print(again.by_loss()[:LISTED], full=full)


def _print(suspects: Sequence[Suspect], *, full: bool) -> None:
    for place, one in enumerate(suspects, 1):
        part = one.part
        typer.echo(
            shown(
                f"{place:>3}. norm {one.grad_norm:.4g}, without it {one.rest:.4g}, loss "
                f"{one.loss:.3f}  row {part.position:,}  {part.where}"
            )
        )
        text = part.text if full else part.text[:SHOWN]
        typer.echo(shown("     " + text.replace("\n", "\n     "), lines=True))
