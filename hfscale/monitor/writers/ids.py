"""Under which id a writer knows a run, kept in its directory, so that a resumed run goes on there.

RUN_DIR/writers/NAME    the id alone
"""

from __future__ import annotations

import os
from pathlib import Path

from hfscale import run_files
from hfscale.records import read_file

MOST = 1000  # bytes of an id


def kept_id(run_dir: Path, writer: str) -> str:
    """Return the id of the run in ``run_dir`` for ``writer``; "" if it has none yet."""
    path = run_dir / run_files.WRITERS / writer
    if not path.is_file():
        return ""
    return read_file(path, most=MOST).decode(errors="replace").strip()


def keep_id(run_dir: Path, writer: str, identity: str) -> None:
    """Write ``identity`` down."""
    folder = run_dir / run_files.WRITERS
    folder.mkdir(exist_ok=True)
    new = folder / f"{writer}.new"
    new.write_text(identity + "\n")
    os.replace(new, folder / writer)
