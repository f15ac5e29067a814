"""`hfscale predict`: predictions of any model for a text, or for a table in as many processes as
there are devices.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from hfscale.errors import ConfigError
from hfscale.run_files import PREDICTIONS
from hfscale.shards.files import alone

if TYPE_CHECKING:
    from hfscale.config.inference import PredictConfig

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A run, a checkpoint, an export, a transformers folder or a hub name."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value...",
        show_default=False,
        help=(
            "Options of the task (threshold=0.3, generation.max_new_tokens=20), or of a "
            "section: data.columns.text=review predict.batch=64 "
            "engine.precision=bf16"
        ),
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task", help="Without it: what the run was trained for, or the architecture suggests."
    ),
]
Procs = Annotated[
    int,
    typer.Option(
        min=1,
        help=(
            "Processes: one a GPU, or some of the CPU. Each has the whole model; with "
            "engine.zero_stage=3 a share of it."
        ),
    ),
]


def predict(
    model: Model,
    overrides: Overrides = None,
    task: TaskName = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSONL, csv, tsv, parquet, txt (a text a line), a folder or glob of them."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write JSONL here; it must not exist, and appears whole. Else it is printed."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", "--prompt", help="One text instead of a table.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="One question, about --context.")] = None,
    context: Annotated[str | None, typer.Option(help="The text that --question is about.")] = None,
    procs: Procs = 1,
) -> None:
    """Predict with MODEL: {"id", "prediction", ...} a line, in the order of DATA. Killed, the same
    command with --out goes on.

    Examples: hfscale predict runs/sentiment --text "What a film!"; hfscale predict
    runs/sentiment@best --data new.csv --out stars.jsonl; hfscale predict exports/gpt --prompt "Once
    upon" generation.max_new_tokens=20
    """
    if (data is None) == (text is None and question is None) or (out and data is None):
        raise ConfigError(
            "say what to predict for",
            where="command line",
            remedy="--data FILE [--out FILE], or --text T, or --question Q --context C",
        )
    from hfscale.config.permission import grant
    from hfscale.jobs.asked import settle
    from hfscale.jobs.predict import predict_texts
    from hfscale.run.model import find
    from hfscale.stream.roles import is_text
    from hfscale.tasks.table import task_class

    config = settle(
        find(model),
        task=task,
        data=data or "-",
        out=out or Path("-"),
        overrides=grant(overrides or ()),
    )
    if data is None:
        kind = task_class(config.task.name)
        columns = kind.columns
        given = {"question": question, "context": context} | (
            {next(iter(columns)): text} if text is not None else {}
        )
        example = {role: value for role, value in given.items() if value is not None}
        if wrong := [role for role in example if role not in columns]:
            raise ConfigError(
                f"the task {config.task.name} has no {wrong[0]}",
                where="command line",
                remedy=f"it has {', '.join(columns)}",
            )
        if lacking := columns.keys() - example.keys() - kind.optional - kind.answers:
            raise ConfigError(
                f"the task {config.task.name} also asks for a {min(lacking)}",
                where="command line",
                remedy="--question Q --context C" if "context" in lacking else "--data FILE",
            )
        if not all(map(is_text, example.values())):
            raise ConfigError("the text is not UTF-8", where="command line", value=ascii(example))
        made = predict_texts(config, {"id": "0", **example})
        typer.echo(
            made["prediction"]
            if isinstance(made["prediction"], str) and len(made) == 2
            else json.dumps(made, ensure_ascii=False)
        )
        return
    if out is not None:
        typer.echo(f"{make(config, procs=procs):,} predictions in {out}")
        return
    with TemporaryDirectory() as scratch:
        here = config.predict.model_copy(update={"out": Path(scratch) / PREDICTIONS})
        make(config.model_copy(update={"predict": here}), procs=procs)
        typer.echo(here.out.read_text("utf-8"), nl=False)


def make(config: PredictConfig, *, procs: int) -> int:
    """Return how many predictions are now in the config's ``out``; they are made by ``procs``
    processes, this one if that is one.

    Raises:
        UserError: for what speaks against it before a process is started, or in this one.
    """
    from hfscale.jobs import predict as job
    from launch.local import start

    with alone(config.predict.out):
        start(config, job.prepare(config), procs=procs)
        return job.join(config)
