"""Verbs about a run and its model: `show`, `batch`, `export`, `predict`. What each needs is imported when it is used."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML file, or a run directory.", show_default=False)] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value...", help="Dotted overrides, values in YAML.",
                                                             show_default=False)] = None,
    procs: Annotated[int | None, typer.Option(help="Show the batch as cut for this many ranks.", min=1)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema instead, for editors.")] = False,
) -> None:
    """Print every value of CONFIG, where it came from (default, file:line, command line), and the numbers that follow.

    Examples: hfscale show configs/pretrain/gpt2_small.yaml train.steps=100; hfscale show --schema > schema.json
    """
    from hfscale.reports.show import show_config, show_schema
    from launch.request import config_file

    if config is None and not schema:
        raise typer.BadParameter("give a CONFIG, or --schema")
    file = config_file(config) if config else None
    typer.echo(show_schema(file) if schema or file is None else show_config(file, overrides or [], procs=procs))


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


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run directory (its newest checkpoint) or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; it must not exist.")],
) -> None:
    """Write OUT as a transformers folder, after proving that transformers computes the logits that the training engine had.

    Example: hfscale export runs/quickstart exports/quickstart
    """
    from hfscale import log
    from hfscale.jobs.export import run

    log.setup()
    run(model, out)
    typer.echo(f"""from transformers import pipeline
generate = pipeline("text-generation", model="{out}")
print(generate("Once upon a time", max_new_tokens=40)[0]["generated_text"])""")


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a checkpoint, an export, a transformers folder or a hub name.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "--text", help="One text to go on with.")] = None,
    data: Annotated[Path | None, typer.Option(help='JSONL with a "prompt" (and an "id", if you like) a line.')] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSONL here instead of the terminal; it must not exist.")] = None,
    field: Annotated[str, typer.Option(help="Which key of DATA holds the prompt.")] = "prompt",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 17,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
) -> None:
    """Go on with a prompt, or with every prompt of a JSONL file: {"id", "prompt", "text"} a line.

    Examples: hfscale predict runs/quickstart --prompt "def main("; hfscale predict exports/gpt --data prompts.jsonl --out texts.jsonl
    """
    import json

    if (prompt is None) == (data is None):
        raise typer.BadParameter("give either --prompt or --data")
    from hfscale import log
    from hfscale.jobs.predict import is_text, read_prompts, run, write_predictions
    from hfscale.training.predictor import Prompt, Sampling

    log.setup()
    if prompt is not None and not is_text(prompt):
        raise typer.BadParameter("--prompt is not UTF-8")
    prompts = [Prompt("0", prompt)] if prompt is not None else read_prompts(data, field=field) if data is not None else []
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    predictions = run(model, prompts, sampling=sampling, batch=batch)
    if out is not None:
        typer.echo(f"{write_predictions(out, predictions)} predictions in {out}")
        return
    for prediction in predictions:
        typer.echo(prediction["prompt"] + prediction["text"] if data is None else json.dumps(prediction, ensure_ascii=False))
