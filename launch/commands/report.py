"""`hfscale report` and its like: pages about runs that one can mail."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hfscale.errors import DataError, shown


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
    from launch.request import training_run

    run_dir = training_run(run)
    write_page(out or run_dir / "report.html", html_of(run_dir))


def write_page(path: Path, html: str) -> None:
    """Write a page, whole or not at all, and say where.

    Raises:
        DataError: if it cannot be written.
    """
    from hfscale.shards.files import write_atomically

    try:
        write_atomically(path, html.encode())
    except (OSError, DataError) as error:
        raise DataError(
            "the page cannot be written",
            where=path,
            value=error.strerror if isinstance(error, OSError) else error.what,
            remedy="name a file, OUT.html, in a folder that is there and that you may write to",
        ) from None
    typer.echo(shown(f"{path}: open it in a browser"))
