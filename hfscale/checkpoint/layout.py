"""Where things lie in a run's ``checkpoints/`` folder, and the moves between its states.

step-00001000            committed: it has a manifest, and was renamed to this name last; with a
                         file `pinned` it is never pruned; or a link to one that somebody moved to
                         another disk: read alike, never pruned
step-00001000.2.partial  being written by the second attempt, or left by a kill; never read, cleared
                         by the next save
step-00001000.old        being deleted; never read
rejected/                what failed verification, kept for inspection, never loaded
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hfscale import run_files
from hfscale.checkpoint.state import Best, CheckpointState, read_state
from hfscale.config.schema import Checkpoint
from hfscale.errors import CheckpointError, UserError

MANIFEST = "manifest.json"
STATE = "state.json"
PROBE = "probe.safetensors"
CONFIG = "config.json"  # the model's, as transformers reads it
GENERATION = "generation_config.json"  # and how it generates, if it does
ENGINE = "engine"
RECORDS = "records"  # inside a partial checkpoint: what each rank has written
REJECTED = "rejected"
PARTIAL, OLD = ".partial", ".old"
PINNED = "pinned"  # an empty file of a user's in a checkpoint
NAME = re.compile(r"step-\d{8,}")


def step_name(step: int) -> str:
    return f"step-{step:08}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def rank_file(rank: int) -> str:
    return f"{ENGINE}/rank-{rank:05}.safetensors"


def state_of(checkpoint: Path) -> CheckpointState:
    """Return what a checkpoint says of itself.

    Raises:
        CheckpointError: as ``read_state``.
    """
    return read_state(checkpoint / STATE)


def candidates(folder: Path) -> list[Path]:
    """Return every folder that has a checkpoint's name, oldest first: committed, or half-copied by
    somebody.
    """
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()),
        key=step_of,
    )


def committed(folder: Path) -> list[Path]:
    """Return the committed checkpoints of ``folder``, oldest first. Their digests are not checked
    here.
    """
    return [path for path in candidates(folder) if (path / MANIFEST).is_file()]


def newest_state(run_dir: Path, *, before: int | None = None) -> CheckpointState | None:
    """Return what the newest committed checkpoint of a run (from ``before`` a step) says of itself;
    None: none that can be read.
    """
    return _newest(
        [
            path
            for path in committed(run_dir / run_files.CHECKPOINTS)
            if before is None or step_of(path) < before
        ]
    )


def _newest(saved: list[Path]) -> CheckpointState | None:
    for checkpoint in reversed(saved):
        with suppress(UserError):  # damaged: a job that loads says so, and falls back as this does
            return state_of(checkpoint)
    return None


def _best(saved: list[Path]) -> Best | None:
    """Return what the newest of the checkpoints ``saved`` knows of the best one."""
    newest = _newest(saved)
    return newest.best if newest else None


def checkpoint_of(name: str | Path) -> Path | None:
    """Return the checkpoint that ``name`` stands for: itself, the newest of a RUN, also a damaged
    one, RUN@best or RUN@STEP. None: neither.

    Raises:
        CheckpointError: if it is a run that has none, or not that one.
    """
    path = Path(name)
    run, _, which = str(name).rpartition("@")
    if run and not path.exists() and (Path(run) / run_files.CHECKPOINTS).is_dir():
        return _chosen(Path(run) / run_files.CHECKPOINTS, which)
    if not path.is_dir() or NAME.fullmatch(path.name):
        return path if path.is_dir() else None
    if not (path / run_files.CHECKPOINTS).is_dir() and (
        (path / CONFIG).is_file() or not run_files.is_run(path)
    ):
        return None
    if saved := candidates(path / run_files.CHECKPOINTS):
        return saved[-1]
    raise CheckpointError(
        "this run has no checkpoint yet",
        where=path,
        remedy=f"go on with it: the command that began it, on {path}",
    )


def _chosen(folder: Path, which: str) -> Path:
    saved = committed(folder)
    there = {str(step_of(path)): path for path in saved}
    if best := _best(saved):
        there["best"] = folder / step_name(best.step)
    if which not in there:
        hint = "" if best else "; a best one, where checkpoint.keep_best names a metric"
        raise CheckpointError(
            "this run has no such checkpoint",
            where=folder.parent,
            value=which,
            remedy=f"it has {', '.join(there)}{hint}",
        )
    return there[which]


def reject(checkpoint: Path) -> Path:
    """Return where a checkpoint now lies that must not be loaded: under ``rejected/``, whole."""
    home = checkpoint.parent / REJECTED
    try:
        home.mkdir(exist_ok=True)
    except FileExistsError:
        raise CheckpointError(
            "damaged checkpoints are moved here, and it is a file",
            where=home,
            remedy="move it away, then run the same command again",
        ) from None
    names = [checkpoint.name, *(f"{checkpoint.name}-{number}" for number in range(2, 10_000))]
    target = next(home / name for name in names if not (home / name).exists())
    checkpoint.rename(target)
    return target


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill left half written or half deleted."""
    for path in folder.iterdir():
        if path.name.startswith("step-") and path.suffix in (PARTIAL, OLD) and path.is_symlink():
            path.unlink()  # what it leads to is not ours
        elif path.name.startswith("step-") and path.suffix == PARTIAL:
            shutil.rmtree(path)
        elif path.name.startswith("step-") and path.suffix == OLD:
            _discard(path)


def kept(folder: Path, policy: Checkpoint) -> dict[Path, list[str]]:
    """Return why each committed checkpoint stays, oldest first; without a reason it goes at the
    next pruning.
    """
    saved = committed(folder)
    best = _best(saved)

    def reasons(path: Path) -> Iterator[str]:
        if path in saved[-policy.keep_last :]:
            yield "last"
        if policy.keep_every_steps and step_of(path) % policy.keep_every_steps == 0:
            yield "permanent"
        if best and best.step == step_of(path):
            yield f"best {best.metric} {best.value:.6g}"
        if (path / PINNED).exists():
            yield "pinned"
        if path.is_symlink():  # it lies elsewhere: taking the link away would free nothing
            yield "link"

    return {path: list(reasons(path)) for path in saved}


def prune(folder: Path, policy: Checkpoint, *, spare: Path | None = None) -> list[Path]:
    """Remove the checkpoints that nothing keeps, but not ``spare``; return them. Other processes
    may prune and pin meanwhile.
    """
    gone = []
    for path in [
        path for path, reasons in kept(folder, policy).items() if not reasons and path != spare
    ]:
        with suppress(FileNotFoundError):  # another process was faster
            # a kill in the middle leaves nothing that looks like a checkpoint
            old = path.rename(path.with_name(path.name + OLD))
            gone += [path] if _discard(old) else []
    return gone


def _discard(old: Path) -> bool:
    """Return True if a checkpoint under its last name was deleted; one that was pinned just before
    it got that name goes back.
    """
    if (old / PINNED).exists():
        old.rename(old.with_suffix(""))
        return False
    shutil.rmtree(old, ignore_errors=True)  # another process may be at it too
    return True


def pin(folder: Path, step: int, *, pinned: bool) -> None:
    """Keep the checkpoint of ``step`` whatever the policy says, or no longer.

    Raises:
        CheckpointError: if there is none, or it was pruned at this moment.
    """
    marker = folder / step_name(step) / PINNED
    with suppress(FileNotFoundError):
        marker.touch() if pinned else marker.unlink(missing_ok=True)
    if not (
        marker if pinned else marker.parent
    ).exists():  # looked up again: it is no use in a folder that has just been renamed
        there = ", ".join(str(step_of(path)) for path in committed(folder))
        raise CheckpointError(
            "there is no checkpoint of this step",
            where=folder,
            value=step,
            remedy=f"there are: {there or 'none yet'}",
        )
