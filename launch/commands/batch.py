"""`hfscale batch`: the texts of any step of a run, and proof that they are the ones."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def batch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    step: Annotated[int, typer.Option(help="Which optimizer step, counted from 1.")],
    full: Annotated[bool, typer.Option("--full", help="Print each text whole, not its first 200 characters.")] = False,
) -> None:
    """Print what a step was trained on, rebuilt from the shards alone. The exit code is 1 if its digest is not the logged one.

    Example: hfscale batch runs/quickstart --step 100
    """
    from hfscale.reports.batch import rebuild

    rebuilt = rebuild(run, step=step)
    for row in rebuilt.rows:
        documents = "-".join(map(str, dict.fromkeys(row.documents)))
        typer.echo(f"row {row.position:,}  {row.source}  {row.shard}  tokens from {row.start:,}  {row.member}  documents {documents}")
        typer.echo("    " + (row.text if full else row.text[:200]).replace("\n", "\n    "))
    verdict = "not logged" if rebuilt.logged is None else "equals the logged one" if rebuilt.logged == rebuilt.digest else (
        f"is NOT the logged one ({rebuilt.logged}): other shards, or another config than this step was trained with")
    typer.echo(f"{len(rebuilt.rows):,} rows, batch_digest {rebuilt.digest}: {verdict}")
    raise typer.Exit(1 if rebuilt.logged not in (None, rebuilt.digest) else 0)
