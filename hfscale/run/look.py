"""What a look at the paths of a request can refuse: commands look before they import torch, which
takes half a minute on a busy machine.
"""

from __future__ import annotations

from pathlib import Path

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.errors import CheckpointError, DataError
from hfscale.hub import local_folder
from hfscale.shards.manifest import FILE_NAME
from hfscale.shards.tables import table_files

REMEDY = "name a run, a checkpoint, an export, a transformers folder"


def look_at_model(name: str) -> None:
    """Return if MODEL ``name`` is there.

    Raises:
        UserError: if it is neither a checkpoint, nor a folder, nor a model of the hub.
    """
    if layout.checkpoint_of(name) is None:
        local_folder(name, where="MODEL", remedy=REMEDY)


def look_at_data(name: str) -> None:
    """Return if the table, or the folder of shards, ``name`` is there, or may be one of the hub.

    Raises:
        DataError: if it is not.
    """
    path = Path(name)
    if path.name != FILE_NAME and not (path / FILE_NAME).is_file():
        table_files(name)


def look_at_out(out: Path) -> None:
    """Return if predictions can be written to ``out``, or were made there by a job.

    Raises:
        DataError: if there is something else.
    """
    if out.exists() and not (run_files.parts_of(out) / run_files.ASKED).is_file():
        raise something_there(out)


def something_there(out: Path) -> DataError:
    """Return what is said where there is a file ``out`` already."""
    return DataError(
        "this file exists already; nothing was written",
        where=out,
        remedy="give another --out, or remove it",
    )


def look_at_export(name: str, out: Path) -> None:
    """Return if ``name`` is a checkpoint, or a run with one, and there is no ``out`` yet.

    Raises:
        CheckpointError: if it is not, or there is.
    """
    if out.exists():
        raise CheckpointError(
            "this folder exists already; nothing was written",
            where=out,
            remedy="name another folder, or remove it",
        )
    if layout.checkpoint_of(name) is None:
        raise run_files.no_run(name, remedy="name a run directory, or a folder in its checkpoints/")
