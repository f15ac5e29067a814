"""What a run has saved: one line a checkpoint, and with verification what is wrong with it. Loads nothing, needs no torch."""
from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hfscale.checkpoint import layout, manifest
from hfscale.errors import CheckpointError


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint; ``problems`` is None where it was not verified."""

    path: Path
    line: str
    problems: list[str] | None


def list_checkpoints(run_dir: Path, *, verify: bool) -> list[Saved]:
    """Return a run's checkpoints, oldest first.

    Raises:
        CheckpointError: if there is no run.
    """
    folder = run_dir / layout.FOLDER
    if not folder.is_dir() and not (run_dir / "config.yaml").is_file():
        raise CheckpointError("no run directory", where=run_dir, remedy="name the folder that holds config.yaml and checkpoints/")
    return [_describe(path, verify=verify) for path in layout.candidates(folder)]


def rejected(run_dir: Path) -> list[Path]:
    """Return what failed verification when a job wanted to load it."""
    folder = run_dir / layout.FOLDER / layout.REJECTED
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _describe(path: Path, *, verify: bool) -> Saved:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    when = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "minutes")
    try:
        state = json.loads((path / layout.STATE).read_text("utf-8"))
        facts = f"{state['tokens_seen']:>16,} tokens  ZeRO {state['zero_stage']} {state['precision']} on {state['world_size']} ranks"
    except (OSError, ValueError, KeyError, TypeError):
        facts = f"{layout.STATE} cannot be read"
    return Saved(path, f"{path.name}  {when}  {size / 1e6:>10,.1f} MB  {facts}", manifest.verify(path) if verify else None)
