"""`hfscale export`: from a run to a folder that transformers loads."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
