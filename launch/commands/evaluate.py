"""`hfscale evaluate`: scores of a model, of one of its checkpoints or of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from hfscale import run_files
from hfscale.config import permission
from hfscale.errors import CheckpointError, ConfigError
from hfscale.shards.files import alone
from launch.commands.predict import Overrides, Procs, make


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help=("A run, a checkpoint, an export, a transformers folder or a hub name."),
        ),
    ] = None,
    overrides: Overrides = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Without it: what the run was trained for, or the architecture suggests."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Labelled examples, or shards. Without it: the held-out ones of the run. Several: "
            "one a --task, or all for one."
        ),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Score this file of predictions; no model is needed.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every checkpoint of the run MODEL, oldest first.")
    ] = False,
    harness: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness instead, with commas."),
    ] = None,
    harness_path: Annotated[
        Path | None,
        typer.Option(help="A folder with YAMLs of such tasks; only these are known then."),
    ] = None,
    procs: Procs = 1,
) -> None:
    """Score MODEL: on labelled examples for its task, a pretrained one on shards (loss, perplexity,
    bits per byte).

    Predictions and scores are kept, in the run directory or in ./evaluations, and found again.

    Examples: hfscale evaluate runs/sentiment --all; hfscale evaluate runs/gpt2-small; hfscale
    evaluate exports/x --data a.csv --data b.csv; hfscale evaluate runs/llama-70b --procs 8
    engine.zero_stage=3; hfscale evaluate --task extractive_qa --data test.jsonl --predictions
    answers.jsonl
    """
    from hfscale.checkpoint import layout
    from hfscale.jobs import evaluate as job
    from hfscale.metrics.kept import read_scores

    said, asked = list(overrides or ()), _pairs(task or [], data or [])
    if model is None or "=" in model:
        said, model = ([model] if model else []) + said, None
    permission.grant(said)
    if predictions:
        typer.echo(job.table([_rescored(model, asked, predictions, said)]))
        return
    if model is None:
        raise ConfigError(
            "there is no MODEL",
            where="command line",
            remedy="name one; or --task, --data and --predictions",
        )
    names = [model]
    if every:
        names = [str(path) for path in layout.committed(Path(model) / run_files.CHECKPOINTS)]
        if not names:
            raise CheckpointError(
                "no run with checkpoints here",
                where=model,
                remedy="--all wants a run directory that has some",
            )
    found: list[dict[str, Any]] = []
    for name in names:
        with _kept(Path(name)) if every else nullcontext(True) as there:
            if not there:
                typer.echo(f"{name} was pruned meanwhile by the run's policy: left out", err=True)
                continue
            for one in asked if harness is None else [(None, None)]:
                home = (
                    _on_harness(name, harness, harness_path, said, procs)
                    if harness is not None
                    else _scored(name, *one, said, procs)
                )
                label = "  ".join(
                    filter(None, [name, *one] if any(one) else [name, home.parent.name])
                )  # on what: its own split, or --data
                found.append({**read_scores(home / run_files.SCORES), "model": label})
    if not found:
        raise CheckpointError(
            "every checkpoint was pruned before it was scored",
            where=model,
            remedy="run the same command again, or keep more: checkpoint.keep_last",
        )
    typer.echo(job.table(found))
    typer.echo(
        "kept in "
        f"{home if len(found) == 1 else home.parent if len(asked) == 1 else home.parents[1]}"
    )


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
) -> dict[str, Any]:
    """Return the scores of a file of predictions; without a ``model``, of which at most the labels
    are read.
    """
    from hfscale.jobs import evaluate as job
    from hfscale.jobs.asked import settle
    from hfscale.run.model import find

    [(task, data), *more] = asked
    if more or (model is None and not (task and data)):
        raise ConfigError(
            "nothing says what these predictions are of",
            where="command line",
            remedy="name MODEL, or one --task and one --data",
        )
    rest, _ = permission.split(said)
    known = None if model is None else find(model)
    config = settle(known, task=task, data=data, out=Path("-"), overrides=rest, answers=True)
    return {"model": str(predictions), **job.score(config, predictions, model=known)}


def _scored(name: str, task: str | None, data: str | None, said: Sequence[str], procs: int) -> Path:
    """Return the folder with the scores of MODEL ``name``, made now or before."""
    from hfscale.jobs import evaluate as job
    from hfscale.jobs.asked import is_pretraining, settle
    from hfscale.jobs.shards import settle as settle_shards
    from hfscale.run.model import find
    from launch.local import start

    model = find(name)
    if task is None and is_pretraining(model, data):
        on_shards = settle_shards(model, data, said)
        with alone(on_shards.evaluate.out):
            if not (on_shards.evaluate.out / run_files.SCORES).is_file():
                start(on_shards, on_shards.evaluate.out / run_files.CONFIG, procs=procs)
        return on_shards.evaluate.out
    rest, _ = permission.split(said)
    config = settle(model, task=task, data=data, out=Path("-"), overrides=rest, answers=True)
    config = job.with_folder(config, model)
    home = config.predict.out.parent
    with alone(home):
        if not (home / run_files.SCORES).is_file():
            if not config.predict.out.is_file():
                make(config, procs=procs)
            job.keep(home, model, job.score(config, config.predict.out, model=model))
    return home


def _on_harness(
    name: str, tasks: str, folder: Path | None, said: Sequence[str], procs: int
) -> Path:
    """Return the folder with scores that were made now: whether the data of the tasks has changed
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
    from launch.local import start

    config = settle(find(name), tasks.split(","), folder, permission.split(said)[0])
    with alone(config.harness.out):
        start(config, config.harness.out / run_files.CONFIG, procs=procs)
    return config.harness.out
