"""`hfscale diff`: two runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfscale.errors import shown
from launch.commands.report import write_page


def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run directory.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT.html", help="Write a page with the curves, too.")
    ] = None,
) -> None:
    """Print in what two runs differ: config, data, code, versions, hardware; and from which step on
    their losses part.

    Example: hfscale diff runs/first runs/second both.html
    """
    from hfscale.reports.diff import compare_runs
    from launch.request import training_run

    compared = compare_runs(training_run(first), training_run(second))
    typer.echo("\n".join(map(shown, compared.text().splitlines())))
    if out:
        write_page(out, compared.html())
