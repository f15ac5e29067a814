"""`hfscale profile`: a look at a few steps of a run that is under way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfscale import run_files
from hfscale.errors import CheckpointError, shown

if TYPE_CHECKING:  # slow to import
    from hfscale.monitor.fence import Fence

POLL_S = 0.5


def profile(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    steps: Annotated[int, typer.Option(min=1, max=100, help="How many steps.")] = 3,
    every_rank: Annotated[
        bool, typer.Option("--every-rank", help="Not rank 0 alone: a trace of each.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until it is there, and print it.")
    ] = True,
) -> None:
    """Ask RUN, which is under way, for a profile of its next steps: a trace for Perfetto, Chrome
    and TensorBoard, GPU memory, flops by module, and the ten most expensive operators.

    It begins after the next logged step. Profiled steps are slower, and their numbers the same.

    Example: hfscale profile runs/first --steps 5
    """
    from hfscale.monitor.fence import newest
    from hfscale.monitor.request import ProfileRequest, request_file
    from hfscale.shards.files import write_atomically
    from launch.request import quote, training_run

    run_dir = training_run(run)
    attempt = newest(run_dir)
    if attempt is None or not attempt.under_way():
        raise CheckpointError(
            "this run is not under way",
            where=run_dir,
            value="it has not begun" if attempt is None else _how_ended(attempt),
            remedy="plan the profile instead: metrics.profile.at_step=20 when you start it",
        )
    request = ProfileRequest(number=time.time_ns(), steps=steps, every_rank=every_rank)
    file = request_file(run_dir)
    file.parent.mkdir(exist_ok=True)
    there = _tables(run_dir)
    write_atomically(file, request.model_dump_json().encode())
    if not wait:
        typer.echo(f"asked; it will lie in {shown(str(file.parent))}")
        return
    typer.echo("waiting for the next logged step (Ctrl-C leaves; the run goes on) ...", err=True)
    while not (new := _tables(run_dir) - there):
        if not attempt.under_way():
            raise CheckpointError(
                "the run ended before it was profiled",
                where=run_dir,
                value=_how_ended(attempt),
                remedy=f"see why: hfscale status {quote(run_dir)}",
            )
        time.sleep(POLL_S)
    table = min(new)[0]
    typer.echo(f"{shown(str(table.parent))}\n{table.read_text().rstrip()}")


def _how_ended(attempt: Fence) -> str:
    """Return how an attempt ended, as far as anybody knows."""
    return str(attempt.ending() or "killed, with its launcher")


def _tables(run_dir: Path) -> set[tuple[Path, int]]:
    """Return the tables of rank 0's profiles, with when each was written, in ns."""
    files = (run_dir / run_files.PROFILES).glob(f"*/{run_files.PROFILED.format(0)}")
    return {(file, file.stat().st_mtime_ns) for file in files}
