"""`hfscale show`: what a config comes to, before anything runs."""
from __future__ import annotations

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
