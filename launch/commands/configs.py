"""``hfscale configs``: the configs that come with it, and copies of them to edit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    help="List the configs that come with hfscale, or copy them to edit.",
    epilog="Example: hfscale configs copy my-project",
)


@app.callback(invoke_without_command=True)
def list_configs(context: typer.Context) -> None:
    """List the configs that come with hfscale, each with the first line of what it says of
    itself.
    """
    if context.invoked_subcommand:
        return
    from launch.share import share

    home = share()
    files = sorted((home / "configs").rglob("*.yaml"))
    names = [str(file.relative_to(home)) for file in files]
    width = max(map(len, names))
    print(f"in {home}")
    for name, file in zip(names, files, strict=True):
        print(f"  {name:{width}}  {_first_comment(file)}".rstrip())
    print("`hfscale configs copy FOLDER` gives you copies of them, and of the scripts for Slurm")


@app.command(epilog="Example: hfscale configs copy my-project")
def copy(
    folder: Annotated[Path, typer.Argument(help="Made if it is not there.")],
) -> None:
    """Copy configs, scripts for Slurm and pins into FOLDER, to edit them there."""
    from hfscale.errors import counted
    from launch.request import quote
    from launch.share import copy as copy_files

    written = copy_files(folder)
    print(f"{counted(len(written), 'file')} in {folder}: configs/, slurm/ and constraints.txt")
    print(f"your own slurm/site.sh counts with  cluster.scripts={quote(folder)}")


def _first_comment(file: Path) -> str:
    """Return what a YAML file says of itself: its first comment, up to a colon or bracket."""
    first = file.read_text(encoding="utf-8").split("\n", 1)[0]
    if not first.startswith("#"):
        return ""
    return re.split(r"[:(.]( |$)| \(", first.lstrip("# "), maxsplit=1)[0]
