"""What a run's attempts were made with, as its ``environment.json`` says."""

from __future__ import annotations

from pathlib import Path

from hfscale import run_files
from hfscale.errors import CheckpointError
from hfscale.records import Record, load


class Code(Record):
    """The checkout: its commit, and the patch in the run directory that was on top of it."""

    revision: str | None = None
    patch: str | None = None

    def words(self) -> str:
        """Return it for people."""
        if self.revision is None:
            return "no checkout"
        return self.revision[:12] + (f" with {self.patch}" if self.patch else "")


class Entry(Record):
    """An attempt. ``ranks`` are "host: device", of each rank, once they have begun."""

    started: str = ""
    launcher: str = ""
    procs: int = 0
    command: list[str] = []
    host: str = ""
    platform: str = ""
    python: str = ""
    packages: dict[str, str] = {}
    code: Code = Code()
    ranks: list[str] = []


def entries(run_dir: Path) -> list[Entry]:
    """Return the attempts, oldest first; none where no launcher wrote them down.

    Raises:
        CheckpointError: if the file is damaged.
    """
    file = run_dir / run_files.ENVIRONMENT
    if not file.is_file():
        return []
    return load(
        file,
        list[Entry],
        what="the record of the run's attempts",
        remedy="restore it, or move it away: the run itself does not need it",
        error=CheckpointError,
    )
