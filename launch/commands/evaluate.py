"""`hfscale evaluate`: scores of a model, of one of its checkpoints or of all of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hfscale import run_files
from hfscale.config import permission
from hfscale.errors import CheckpointError, ConfigError
from hfscale.metrics.kept import Scores, read_scores
from hfscale.shards.files import alone
from launch.commands.predict import Launcher, Overrides, Procs, nothing_left_if_refused, start

Name = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A run, a checkpoint, an export, a transformers folder or a hub name.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(help="Without it: what the run was trained for, or the architecture suggests."),
]
Tables = Annotated[
    list[str] | None,
    typer.Option(
        help="Labelled examples, or shards. Without it: the held-out ones of the run. Several: "
        "one a --task, or all for one."
    ),
]
Predictions = Annotated[
    Path | None, typer.Option(help="Score this file of predictions; no model is needed.")
]
Every = Annotated[
    bool, typer.Option("--all", help="Every checkpoint of the run MODEL, oldest first.")
]
Harness = Annotated[
    str | None,
    typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness instead, with commas."),
]
HarnessPath = Annotated[
    Path | None,
    typer.Option(help="A folder with YAMLs of such tasks; only these are known then."),
]


@dataclass(frozen=True)
class How:
    """What the command line says of each of the models."""

    overrides: Sequence[str]
    procs: int
    launcher: str
    harness: str | None
    harness_path: Path | None


def evaluate(
    model: Name = None,
    overrides: Overrides = None,
    task: Tasks = None,
    data: Tables = None,
    predictions: Predictions = None,
    every: Every = False,
    harness: Harness = None,
    harness_path: HarnessPath = None,
    procs: Procs = 1,
    launcher: Launcher = "local",
) -> None:
    """Score MODEL: on labelled examples for its task, a pretrained one on shards (loss, perplexity,
    bits per byte).

    Predictions and scores are kept, in the run directory or in ./evaluations, and found again: also
    what a job of the cluster has made.

    Examples: hfscale evaluate runs/sentiment --all; hfscale evaluate runs/gpt2-small; hfscale
    evaluate exports/x --data a.csv --data b.csv; hfscale evaluate runs/llama-70b --procs 8
    engine.zero_stage=3; hfscale evaluate runs/llama-70b --launcher slurm cluster.nodes=2
    cluster.gpus_per_node=8 engine.zero_stage=3; hfscale evaluate --task extractive_qa --data
    test.jsonl --predictions answers.jsonl
    """
    said, asked = list(overrides or ()), _pairs(task or [], data or [])
    if model is None or "=" in model:
        said, model = ([model] if model else []) + said, None
    permission.grant(said)
    if predictions:
        rescored = _rescored(model, asked, predictions, said)
        from hfscale.jobs.evaluate import table

        typer.echo(table([rescored]))
        return
    if model is None:
        raise ConfigError(
            "there is no MODEL",
            where="command line",
            remedy="name one; or --task, --data and --predictions",
        )
    how = How(said, procs, launcher, harness, harness_path)
    asked = asked if harness is None else [(None, None)]
    kept = _on_all(model, asked, how) if every else _on_each(model, asked, how)
    if not kept:
        return  # jobs make them, which was said
    from hfscale.jobs.evaluate import table

    typer.echo(table([scores for _, scores in kept]))
    home, _ = kept[-1]
    if len(kept) > 1:
        home = home.parent if len(asked) == 1 else home.parents[1]
    typer.echo(f"kept in {home}")


Pairs = Sequence[tuple[str | None, str | None]]  # a task, and the data it is for
Kept = list[tuple[Path, Scores]]  # the folder of scores, and they


def _on_all(run: str, asked: Pairs, how: How) -> Kept:
    """Return the scores of every checkpoint of a run, oldest first."""
    from hfscale.checkpoint import layout

    if how.launcher != "local":
        raise ConfigError(
            "a job of the cluster is of one model",
            where="--all, --launcher",
            value=how.launcher,
            remedy="name checkpoints one by one, or submit an array: slurm/evaluate.sbatch",
        )
    if not run_files.is_run(Path(run)):
        raise run_files.no_run(run)
    names = [str(path) for path in layout.committed(Path(run) / run_files.CHECKPOINTS)]
    if not names:
        raise CheckpointError(
            "this run has no checkpoint yet",
            where=run,
            remedy="--all scores those that there are: train first",
        )
    kept: Kept = []
    for name in names:
        with _kept(Path(name)) as there:
            if not there:
                typer.echo(f"{name} was pruned meanwhile by the run's policy: left out", err=True)
                continue
            kept += _on_each(name, asked, how)
    if not kept:
        raise CheckpointError(
            "every checkpoint was pruned before it was scored",
            where=run,
            remedy="run the same command again, or keep more: checkpoint.keep_last",
        )
    return kept


def _on_each(name: str, asked: Pairs, how: How) -> Kept:
    """Return the scores of a model, without those that a job was submitted for."""
    kept: Kept = []
    for task, data in asked:
        home = _on_harness(name, how) if how.harness is not None else _scored(name, task, data, how)
        if not (home / run_files.SCORES).is_file():
            continue
        # on what: its own split, or --data
        label = [name, task, data] if task or data else [name, home.parent.name]
        scores = read_scores(home / run_files.SCORES)
        name_shown = "  ".join(filter(None, label))
        kept.append((home, scores.model_copy(update={"model": name_shown})))
    return kept


@contextmanager
def _kept(checkpoint: Path) -> Iterator[bool]:
    """Yield whether ``checkpoint`` is still there, and keep its run from pruning it inside."""
    from hfscale.checkpoint import layout

    folder, step = checkpoint.parent, layout.step_of(checkpoint)
    pinned = (checkpoint / layout.PINNED).exists()
    try:
        layout.pin(folder, step, pinned=True)
    except CheckpointError:
        yield False
        return
    try:
        yield True
    finally:
        if not pinned and checkpoint.exists():
            layout.pin(folder, step, pinned=False)


def _pairs(tasks: Sequence[str], tables: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Return which task is for which data; None where the model says it."""
    if len(tasks) > 1 and len(tasks) != len(tables):
        raise ConfigError(
            "each of several tasks wants its data",
            where="command line",
            value=f"{len(tasks)} --task, {len(tables)} --data",
            remedy="give --task and --data in pairs",
        )
    own: list[str | None] = [*tasks] if len(tasks) > 1 else [*tasks, None][:1] * max(1, len(tables))
    of: list[str | None] = [*tables] or [None]
    return list(zip(own, of, strict=True))


def _rescored(
    model: str | None,
    asked: Sequence[tuple[str | None, str | None]],
    predictions: Path,
    said: Sequence[str],
) -> Scores:
    """Return the scores of a file of predictions; without a ``model``, of which at most the labels
    are read.
    """
    from hfscale.run.look import look_at_data, look_at_model

    [(task, data), *more] = asked
    if model is not None:
        look_at_model(model)
    for table in (str(predictions), data):
        if table is not None:
            look_at_data(table)
    if more or (model is None and not (task and data)):
        raise ConfigError(
            "nothing says what these predictions are of",
            where="command line",
            remedy="name MODEL, or one --task and one --data",
        )
    from hfscale.jobs import evaluate as job
    from hfscale.jobs.asked import settle
    from hfscale.run.model import find

    rest, _ = permission.split(said)
    known = None if model is None else find(model)
    config = settle(known, task=task, data=data, out=Path("-"), overrides=rest, answers=True)
    return job.score(config, predictions, model=known, name=str(predictions))


def _scored(name: str, task: str | None, data: str | None, how: How) -> Path:
    """Return the folder with the scores of MODEL ``name``: made now or before, or by a job that was
    submitted.
    """
    from hfscale.run.look import look_at_data, look_at_model

    look_at_model(name)
    if data is not None:
        look_at_data(data)
    from hfscale.jobs import evaluate as job
    from hfscale.jobs.asked import is_pretraining, settle
    from hfscale.jobs.predict import prepare
    from hfscale.jobs.shards import settle as settle_shards
    from hfscale.run.model import find

    model = find(name)
    if task is None and is_pretraining(model, data):
        on_shards = settle_shards(model, data, how.overrides)
        with alone(on_shards.evaluate.out):
            if not (on_shards.evaluate.out / run_files.SCORES).is_file():
                start(on_shards, procs=how.procs, launcher=how.launcher)
        return on_shards.evaluate.out
    rest, _ = permission.split(how.overrides)
    config = settle(model, task=task, data=data, out=Path("-"), overrides=rest, answers=True)
    config = job.with_folder(config, model)
    home = config.predict.out.parent
    with alone(home):
        if not (home / run_files.SCORES).is_file():
            with nothing_left_if_refused(config.predict.out):
                if not config.predict.out.is_file():
                    prepare(config)
                start(config, procs=how.procs, launcher=how.launcher)
            if how.launcher == "local":
                shutil.rmtree(run_files.parts_of(config.predict.out), ignore_errors=True)
    return home


def _on_harness(name: str, how: How) -> Path:
    """Return the folder with scores that are made now: whether the data of the tasks has changed
    is not known here.
    """
    try:
        from hfscale.jobs.harness import settle
    except ImportError as error:
        raise ConfigError(
            f"the harness cannot be loaded: {error}",
            where="--harness",
            remedy="pip install 'hfscale[eval]'",
        ) from error
    from hfscale.run.model import find

    tasks = (how.harness or "").split(",")
    config = settle(find(name), tasks, how.harness_path, permission.split(how.overrides)[0])
    with alone(config.harness.out):
        start(config, procs=how.procs, launcher=how.launcher)
    return config.harness.out
