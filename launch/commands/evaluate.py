"""`hfscale evaluate`: scores of a model, of one of its checkpoints or of all of them."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hfscale.errors import CheckpointError, ConfigError
from launch.commands.predict import Overrides, Procs, TaskName, make


def evaluate(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False, help=(
        "A run, a checkpoint, an export, a transformers folder or a hub name."))] = None,
    overrides: Overrides = None, task: TaskName = None,
    data: Annotated[str | None, typer.Option(help="Labelled examples; or shards. Without it: the held-out ones of the run.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Score this file of predictions; no model is needed.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of the run MODEL, oldest first.")] = False,
    harness: Annotated[str | None, typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness instead, with commas.")] = None,
    harness_path: Annotated[Path | None, typer.Option(help="A folder with YAMLs of such tasks; only these are known then.")] = None,
    procs: Procs = 1,
) -> None:
    """Score MODEL: on labelled examples for its task, a pretrained one on shards (loss, perplexity, bits per byte).

    Predictions and scores are kept, in the run directory or in ./evaluations, and found again.

    Examples: hfscale evaluate runs/sentiment --all; hfscale evaluate runs/gpt2-small; hfscale evaluate exports/x --data test.csv;
    hfscale evaluate runs/llama-70b --procs 8 engine.zero_stage=3;
    hfscale evaluate --task extractive_qa --data test.jsonl --predictions answers.jsonl
    """
    from hfscale import log
    from hfscale.checkpoint import layout
    from hfscale.jobs import evaluate as job
    from hfscale.jobs.opening import is_pretraining, settle
    from hfscale.jobs.shards import settle as settle_shards
    from launch.local import start

    log.setup()
    said = list(overrides or ())
    if model is None or "=" in model:
        said = ([model] if model else []) + said
        if not (task and data and predictions):
            raise ConfigError("there is no MODEL", where="command line", remedy="name one; or --task, --data and --predictions")
        config = settle(None, task=task, data=data, out=Path("-"), overrides=said, answers=True)
        typer.echo(job.table([{"model": str(predictions), **job.score(config, predictions, model=False)}]))
        return
    names = [model]
    if every:
        names = [str(path) for path in layout.committed(Path(model) / layout.FOLDER)]
        if not names:
            raise CheckpointError("no run with checkpoints here", where=model, remedy="--all wants a run directory that has some")
    found: list[dict[str, Any]] = []
    for name in names:
        if harness is not None:
            asked: Any = _harness().settle(name, harness.split(","), harness_path, said)
            home = asked.harness.out
            start(asked, home / "config.yaml", procs=procs)  # anew: whether its data has changed is not known here
        elif task is None and is_pretraining(name, data):
            asked = settle_shards(name, data, said)
            home = asked.evaluate.out
            if not (home / job.SCORES).is_file():
                start(asked, home / "config.yaml", procs=procs)
        else:
            config = settle(name, task=task, data=data, out=Path("-"), overrides=said, answers=True)
            if predictions:
                typer.echo(job.table([{"model": str(predictions), **job.score(config, predictions)}]))
                return
            config = job.with_folder(config)
            home = config.predict.out.parent
            if not (home / job.SCORES).is_file():
                if not config.predict.out.is_file():
                    make(config, procs=procs)
                job.keep(home, name, job.score(config, config.predict.out))
        found.append({**json.loads((home / job.SCORES).read_text("utf-8")), "model": name})
    typer.echo(job.table(found))
    typer.echo(f"kept in {home if len(names) == 1 else home.parent}")


def _harness() -> Any:
    try:
        from hfscale.jobs import harness
    except ImportError as error:
        raise ConfigError(f"the harness cannot be loaded: {error}", where="--harness", remedy="pip install 'hfscale[eval]'") from error
    return harness
