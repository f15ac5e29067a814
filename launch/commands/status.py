"""`hfscale status`: the queue's word on a run, and the run's own."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def status(run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """Print where RUN is: its job and the queue, step, loss, tokens a second, expected end, last checkpoint, restarts.

    Example: hfscale status runs/first
    """
    from hfscale.reports.status import describe
    from launch.queue import JOB, facts
    from launch.request import Request

    lines = describe(Request(run).load().config)
    file = Path(run) / JOB
    if file.is_file():
        job = file.read_text().strip()
        told = facts(job)
        words = [f"{job} {told.get('JobState', 'has left the queue')}"]
        forms = {"Reason": "because of {}", "NodeList": "on {}", "Restarts": "{} restarts", "RunTime": "ran {}", "TimeLimit": "limit {}",
                 "ExitCode": "exit code {}"}
        words += [form.format(told[name]) for name, form in forms.items() if told.get(name) not in (None, "None", "(null)", "", "0:0")]
        lines.insert(1, ("job", ", ".join(words)))
    for name, value in lines:
        typer.echo(f"{name:<16}{value}")
