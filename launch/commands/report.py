"""`hfscale report` and its like: pages about runs that one can mail."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfscale.errors import shown


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT.html", help="The page; default: report.html in the run."),
    ] = None,
) -> None:
    """Write a page about RUN that one can mail: curves, where its time went, incidents, data,
    checkpoints, scores, hardware, versions, how to repeat it. One file, no network.

    Example: hfscale report runs/first first.html
    """
    from hfscale.reports.report import report as html_of
    from launch.request import config_file

    run_dir = config_file(run).resolve().parent
    write_page(out or run_dir / "report.html", html_of(run_dir))


def write_page(path: Path, html: str) -> None:
    """Write a page, whole or not at all, and say where.

    Raises:
        DataError: if it cannot be written.
    """
    from hfscale.shards.files import cannot_write, write_atomically

    try:
        write_atomically(path, html.encode())
    except OSError as error:
        raise cannot_write(path, error) from None
    typer.echo(shown(f"{path}: open it in a browser"))
