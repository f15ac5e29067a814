"""`hfscale predict`: predictions of any model for a text, or for a table in as many processes as
there are devices.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from hfscale.errors import ConfigError, UserError
from hfscale.registry import load_plugin
from hfscale.run_files import PREDICTIONS, parts_of
from hfscale.shards.files import alone

if TYPE_CHECKING:
    from hfscale.config.inference import HarnessConfig, PredictConfig, ShardsConfig

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
            "section: data.columns.text=review "
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


Launcher = Annotated[
    str,
    typer.Option(
        help=(
            "local: processes here; slurm, submitit: a job, over cluster.nodes=N "
            "cluster.gpus_per_node=M."
        ),
    ),
]


Table = Annotated[
    str | None,
    typer.Option(help="JSONL, csv, tsv, parquet, txt (a text a line), a folder or glob of them."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Write JSONL here; it must not exist, and appears whole. Else it is printed."
    ),
]
Text = Annotated[
    str | None, typer.Option("--text", "--prompt", help="One text instead of a table.")
]
Question = Annotated[str | None, typer.Option(help="One question, about --context.")]
Context = Annotated[str | None, typer.Option(help="The text that --question is about.")]


def predict(
    model: Model,
    overrides: Overrides = None,
    task: TaskName = None,
    data: Table = None,
    out: Out = None,
    text: Text = None,
    question: Question = None,
    context: Context = None,
    procs: Procs = 1,
    launcher: Launcher = "local",
) -> None:
    """Predict with MODEL: {"id", "prediction", ...} a line, in the order of DATA. Killed, the same
    command with --out goes on. A job of the cluster writes --out.

    Examples: hfscale predict runs/sentiment --text "What a film!"; hfscale predict
    runs/sentiment@best --data new.csv --out stars.jsonl; hfscale predict exports/gpt --prompt "Once
    upon" generation.max_new_tokens=20; hfscale predict runs/gpt --data prompts.jsonl --out
    texts.jsonl --launcher slurm cluster.nodes=2 cluster.gpus_per_node=8
    """
    _check_asked(data=data, out=out, text=text, question=question)
    if launcher != "local" and out is None:
        raise ConfigError(
            "a job of the cluster writes a file",
            where="--launcher",
            value=launcher,
            remedy="--data FILE --out FILE, or --launcher local",
        )
    from hfscale.run.look import look_at_data, look_at_model, look_at_out

    look_at_model(model)
    if data is not None:
        look_at_data(data)
    if out is not None:
        look_at_out(out)
    from hfscale.config.permission import grant
    from hfscale.jobs.asked import settle
    from hfscale.run.model import find

    known, rest = find(model), grant(overrides or ())
    config = settle(known, task=task, data=data or "-", out=out or Path("-"), overrides=rest)
    if data is None:
        typer.echo(_answer(config, text=text, question=question, context=context))
    elif out is not None:
        count = make(config, procs=procs, launcher=launcher)
        if out.exists():
            typer.echo(f"{count:,} predictions in {out}")
    else:
        with TemporaryDirectory() as scratch:
            here = config.predict.model_copy(update={"out": Path(scratch) / PREDICTIONS})
            make(config.model_copy(update={"predict": here}), procs=procs)
            typer.echo(here.out.read_text("utf-8"), nl=False)


def _check_asked(
    *, data: str | None, out: Path | None, text: str | None, question: str | None
) -> None:
    """Return if the command line says one thing to predict for.

    Raises:
        ConfigError: if it says none, or two, or a file for the answer to a text.
    """
    asked = {"--data": data, "--text (or --prompt)": text, "--question": question}
    given = [name for name, value in asked.items() if value is not None]
    remedy = "--data FILE [--out FILE], or --text T, or --question Q --context C"
    if not given:
        raise ConfigError("say what to predict for", where="command line", remedy=remedy)
    if len(given) > 1:
        raise ConfigError(
            "say one thing to predict for",
            where="command line",
            value=" and ".join(given),
            remedy=remedy,
        )
    if out is not None and data is None:
        raise ConfigError(
            "the answer to one text is printed: there is nothing to write",
            where="--out",
            value=str(out),
            remedy="leave --out out, or give a table: --data FILE --out FILE",
        )


def _answer(
    config: PredictConfig, *, text: str | None, question: str | None, context: str | None
) -> str:
    """Return the prediction for what the command line says itself.

    Raises:
        ConfigError: if the task asks for something else.
    """
    from hfscale.jobs.predict import predict_texts
    from hfscale.stream.roles import is_text
    from hfscale.tasks.table import task_class

    kind = task_class(config.task.name)
    columns = kind.columns
    given = {"question": question, "context": context}
    if text is not None:
        given[next(iter(columns))] = text
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
    prediction = predict_texts(config, {"id": "0", **example})
    if isinstance(prediction["prediction"], str) and len(prediction) == 2:
        return prediction["prediction"]
    return json.dumps(prediction, ensure_ascii=False)


def make(config: PredictConfig, *, procs: int, launcher: str = "local") -> int:
    """Return how many predictions are now in the config's ``out``, or will be: they are made by
    ``procs`` processes, this one if that is one, or by a job of the cluster.

    Raises:
        UserError: for what speaks against it before a process is started, or in this one.
    """
    from hfscale.jobs import predict as job

    with alone(config.predict.out):
        with nothing_left_if_refused(config.predict.out):
            count = job.prepare(config)
            if not config.predict.out.exists():
                start(config, procs=procs, launcher=launcher)
        if launcher == "local":
            shutil.rmtree(parts_of(config.predict.out))
        return count


@contextmanager
def nothing_left_if_refused(out: Path) -> Iterator[None]:
    """Take the folder of the parts of ``out`` away, if it is new and what is done inside is refused
    before any part is made.
    """
    parts = parts_of(out)
    begun = parts.exists()
    try:
        yield
    except UserError:
        if not begun and not any(parts.glob("0*.jsonl")):
            shutil.rmtree(parts, ignore_errors=True)
        raise


def start(
    config: PredictConfig | ShardsConfig | HarnessConfig, *, procs: int, launcher: str
) -> None:
    """Return when what ``config`` says is done; or, by a job of the cluster, submitted.

    Raises:
        typer.Exit: with the exit code, if it was stopped or a process failed.
        UserError: for what speaks against it before a process is started, or in this one.
    """
    from launch.job import Computation
    from launch.request import LAUNCHERS, refuse_copies

    refuse_copies()
    starters = {**LAUNCHERS, "local": "launch.local:compute"}
    del starters["debug"]
    # the cluster says how many a job has, unless somebody else does
    asked = None if launcher != "local" and procs == 1 else procs
    job = Computation(config, procs=asked)
    if code := load_plugin("launcher", starters, launcher)(job):
        raise typer.Exit(code)
