"""`hfscale predict`: text from a model, for a prompt or for a file of them."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
