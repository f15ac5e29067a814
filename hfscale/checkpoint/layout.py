"""Where things lie in a run's ``checkpoints/`` folder, and the moves between its states.

    step-00001000          committed: it has a manifest, and was renamed to this name last
    step-00001000.partial  being written, or left by a kill; never read, cleared by the next save
    step-00001000.old      being deleted; never read
    rejected/              what failed verification, kept for inspection, never loaded
"""
from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

FOLDER = "checkpoints"  # of a run directory
MANIFEST = "manifest.json"
STATE = "state.json"
PROBE = "probe.safetensors"
ENGINE = "engine"
RECORDS = "records"  # inside a partial checkpoint: what each rank has written
REJECTED = "rejected"
PARTIAL, OLD = ".partial", ".old"


def step_name(step: int) -> str:
    return f"step-{step:08}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def rank_file(rank: int) -> str:
    return f"{ENGINE}/rank-{rank:05}.safetensors"


def candidates(folder: Path) -> list[Path]:
    """Return every folder that has a checkpoint's name, oldest first: committed, or half-copied by somebody."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()), key=step_of)


def committed(folder: Path) -> list[Path]:
    """Return the committed checkpoints of ``folder``, oldest first. Their digests are not checked here."""
    return [path for path in candidates(folder) if (path / MANIFEST).is_file()]


def newest_state(run_dir: Path, *, before: int | None = None) -> dict[str, Any] | None:
    """Return what the newest committed checkpoint of a run (from ``before`` a step) says of its position, or None if there is none."""
    found = [path for path in committed(run_dir / FOLDER) if before is None or step_of(path) < before]
    return json.loads((found[-1] / STATE).read_text("utf-8")) if found else None


def reject(checkpoint: Path) -> Path:
    """Return where a checkpoint now lies that must not be loaded: under ``rejected/``, whole."""
    home = checkpoint.parent / REJECTED
    home.mkdir(exist_ok=True)
    names = [checkpoint.name, *(f"{checkpoint.name}-{number}" for number in range(2, 10_000))]
    target = next(home / name for name in names if not (home / name).exists())
    checkpoint.rename(target)
    return target


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill left half written or half deleted."""
    for path in folder.iterdir():
        if path.name.startswith("step-") and path.suffix in (PARTIAL, OLD):
            shutil.rmtree(path)


def prune(folder: Path, *, keep_last: int, keep_every_steps: int | None) -> list[Path]:
    """Remove all but the newest ``keep_last`` checkpoints and the permanent ones; return what was removed."""
    def permanent(checkpoint: Path) -> bool:
        return keep_every_steps is not None and step_of(checkpoint) % keep_every_steps == 0

    gone = [path for path in committed(folder)[:-keep_last] if not permanent(path)]
    for path in gone:
        doomed = path.rename(path.with_name(path.name + OLD))  # a kill in the middle leaves nothing that looks like a checkpoint
        shutil.rmtree(doomed)
    return gone


def sync_folder(folder: Path) -> None:
    """Make names in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
