"""`hfscale status`: where a run is, once or for as long as one watches."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfscale.errors import shown
from hfscale.run_files import JOB
from launch.interrupt import Interrupted, listen

if TYPE_CHECKING:  # slow to import
    from hfscale.reports.status import Line

WATCH_S = 5.0  # between two looks
# to a terminal: to its first line; the rest of a line is empty; and all below
HOME, TO_END_OF_LINE, REST = "\x1b[H", "\x1b[K", "\x1b[J"


def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it anew every few seconds, until Ctrl-C.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it for scripts.")] = False,
) -> None:
    """Print where RUN is: its job and the queue, step, loss, tokens a second, expected end with its
    spread, last checkpoint, last incident, goodput, the slowest rank, attempts.

    Examples: hfscale status runs/first; hfscale status runs/first --watch
    """
    if watch and as_json:
        raise typer.BadParameter("--watch is for people, --json for scripts: give one of them")
    if as_json:
        told = [line for line in _status(run) if line.value is not None]
        values = {line.name.replace(" ", "_"): line.value for line in told}
        typer.echo(json.dumps(values, ensure_ascii=False))
    elif watch:
        listen(quietly=True)
        with suppress(Interrupted):
            _watch(run)
    else:
        typer.echo(_shown(_status(run)))


def _watch(run: str) -> None:
    """Show where a run is every few seconds: on a terminal over what was there."""
    while True:
        text = _shown(_status(run))
        if sys.stdout.isatty():
            text = HOME + "".join(f"{line}{TO_END_OF_LINE}\n" for line in text.splitlines()) + REST
        typer.echo(text)
        time.sleep(WATCH_S)


def _shown(lines: Sequence[Line]) -> str:
    return "\n".join(shown(f"{line.name:<16}{line.words}") for line in lines)


def _status(run: str) -> list[Line]:
    """Return the lines on a run, with what Slurm says of its job."""
    from hfscale.monitor.fence import newest
    from hfscale.reports.status import Line
    from launch.job import open_job
    from launch.queue import facts

    file, attempt = Path(run) / JOB, newest(Path(run))
    job = file.read_text().strip() if file.is_file() else ""
    told = facts(job)
    if job and told is not None:
        running = told.get("JobState") == "RUNNING"
    else:  # no job, or nobody answers
        running = attempt is None or attempt.under_way()
    lines = open_job(run).status(running=running)
    if job:
        gone = "of which Slurm gives no answer" if told is None else "has left the queue"
        words = [f"{job} {(told or {}).get('JobState', gone)}"]
        forms = {
            "Reason": "because of {}",
            "NodeList": "on {}",
            "Restarts": "{} restarts",
            "RunTime": "ran {}",
            "TimeLimit": "limit {}",
            "ExitCode": "exit code {}",
        }
        words += [
            form.format(told[name])
            for name, form in forms.items()
            if told and told.get(name) not in (None, "None", "(null)", "", "0:0")
        ]
        lines.insert(1, Line("job", ", ".join(words), {"id": job, **(told or {})}))
    return lines
