"""What a run has saved, why each checkpoint is kept, and what is wrong with it. Loads nothing,
needs no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from hfscale import run_files
from hfscale.checkpoint import layout, manifest
from hfscale.config.load import load_config
from hfscale.config.schema import Checkpoint
from hfscale.errors import CheckpointError


def open_folder(run_dir: Path) -> tuple[Path, Checkpoint]:
    """Return the checkpoints' folder of a run, and what the run keeps.

    Raises:
        CheckpointError: if there is no run.
    """
    if not run_files.is_run(run_dir):
        raise run_files.no_run(run_dir)
    return run_dir / run_files.CHECKPOINTS, load_config(
        run_dir / run_files.CONFIG
    ).config.checkpoint


def list_checkpoints(run_dir: Path, *, verify: bool) -> Iterator[tuple[str, list[str] | None]]:
    """Yield a line for each of a run's checkpoints, oldest first, and what is wrong with it; None
    where it was not verified.
    """
    folder, policy = open_folder(run_dir)
    reasons = layout.kept(folder, policy)
    for path in layout.candidates(folder):
        with suppress(FileNotFoundError):  # the running job prunes
            line = _describe(path, reasons.get(path, ["not committed"]))
            problems = manifest.verify(path) if verify else None
            if path.is_dir():
                yield line, problems


def prune(run_dir: Path) -> tuple[list[Path], int]:
    """Return the checkpoints that were removed, and the free bytes now. The newest good one stays,
    also behind damaged ones.
    """
    folder, policy = open_folder(run_dir)
    good = next(
        (path for path in reversed(layout.committed(folder)) if not manifest.verify(path)), None
    )
    return layout.prune(folder, policy, spare=good), shutil.disk_usage(run_dir).free


def rejected(run_dir: Path) -> list[Path]:
    """Return what failed verification when a job wanted to load it."""
    folder = run_dir / run_files.CHECKPOINTS / layout.REJECTED
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _describe(path: Path, reasons: list[str]) -> str:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    saved = datetime.fromtimestamp(
        next(file for file in (path / layout.STATE, path) if file.exists()).stat().st_mtime
    )
    hours = (datetime.now() - saved).total_seconds() / 3600
    age = (
        f"{hours * 60:.0f} min"
        if hours < 2
        else f"{hours:.0f} h"
        if hours < 48
        else f"{hours / 24:.0f} days"
    )
    try:
        state = layout.state_of(path)
        facts = (
            f"{state.tokens_seen:>16,} tokens  ZeRO {state.zero_stage} "
            f"{state.precision} on {state.world_size} ranks"
        )
    except CheckpointError:
        facts = f"{layout.STATE} cannot be read"
    why = ", ".join(reasons) or "nothing keeps it: goes at the next pruning"
    return (
        f"{path.name}  {saved.isoformat(' ', 'minutes')} ({age} ago)  {size / 1e6:>10,.1f} "
        f"MB  {facts}  [{why}]"
    )
