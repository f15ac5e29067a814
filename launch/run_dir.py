"""The run directory: made once, then only added to. One launcher at a time may work in it.

What lies in it: ``hfscale/run_files.py``. Its config.yaml is that of the newest attempt; every
earlier value is in environment.json, which has an entry an attempt: command, packages, code (its
commit, and the patch beside it), hosts, data, sources of values, changes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from hfscale.checkpoint import layout
from hfscale.config import permission
from hfscale.config.load import Loaded, load_config, to_yaml
from hfscale.config.rules import Difference, differences, resume_differences
from hfscale.config.schema import TrainConfig
from hfscale.dist.secret import make_secret
from hfscale.dist.world import allocation
from hfscale.errors import EXIT_USER_ERROR, CheckpointError, ConfigError, DataError
from hfscale.log import logger
from hfscale.monitor import fence
from hfscale.records import load
from hfscale.run_files import (
    ATTEMPTS,
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    HEARTBEATS,
    JOB,
    LOCK,
    LOGS,
    METRICS,
    REHEARSAL,
    RESTARTS,
    SECRET,
    is_run,
)
from hfscale.shards.files import flock, open_lock, write_atomically
from hfscale.tokenizer import tokenizer_digest
from hfscale.worker import take_attempt
from launch.environment import describe
from launch.queue import refuse_holder


def compare(config: TrainConfig) -> list[str]:
    """Return notices about what this config changes in its run directory; nothing is written.

    Raises:
        CheckpointError: if the directory is somebody else's, or a run that has trained with what
            may not change.
    """
    path = config.run_dir
    if path.exists() and not path.is_dir():
        raise CheckpointError("the run directory is a file", where=path, remedy=_other_name(config))
    if not is_run(path):
        names = (
            {p.name for p in path.iterdir() if not p.name.startswith(".")}
            if path.exists()
            else set()
        )
        # what a job that has just begun has written, or an early kill leaves
        early = {
            LOCK,
            JOB,
            RESTARTS,
            SECRET,
            ATTEMPTS,
            REHEARSAL,
        }
        if foreign := sorted(name for name in names - early if not name.startswith("environment")):
            raise CheckpointError(
                "this folder is not a run directory and not empty",
                where=path,
                value=foreign[:5],
                remedy=_other_name(config),
            )
        return []
    if not (layout.candidates(path / CHECKPOINTS) or _logged_bytes(path)):  # it has not trained
        return []
    refused, noticed = resume_differences(load_config(path / CONFIG).config, config)
    digests = _tokenizer_digests(path, config.tokenizer.path) if config.tokenizer else []
    if len(digests) == 1:
        # it was at most moved
        refused = [difference for difference in refused if difference.key != "tokenizer.path"]
    elif digests:
        refused.append(Difference("the tokenizer's digest", *digests))
    if refused:
        changes = "".join(f"\n          {difference}" for difference in refused)
        raise CheckpointError(
            f"this run has trained with another config; a resume cannot change:{changes}",
            where=path,
            remedy=f"{_other_name(config)} starts a new run with this config",
        )
    if newest := layout.newest_state(path):
        newest.check_optimizer(config.optim, where=path)
    return [f"the run goes on with {difference}" for difference in noticed]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` against every other launcher, making it if need be. The kernel lets go when
    this process ends, however it ends.

    Raises:
        CheckpointError: if a run is at work there; it names that one.
        ConfigError: if the directory cannot be made.
    """
    if (path / LOCK).is_symlink():
        _refuse_links(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = io.TextIOWrapper(open_lock(path / LOCK), encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"cannot make the run directory: {error.strerror}",
            where=path,
            remedy="choose another run.root",
        ) from None
    with file:
        _refuse_links(path)
        try:
            locks = flock(file, wait=False)
        except BlockingIOError:
            file.seek(0)
            raise _at_work(path, file.read().strip() or "unknown") from None
        refuse_holder(path)
        _refuse_lease(path, locks=locks)
        file.truncate(0)
        print(
            f"process {os.getpid()} on {socket.gethostname()} since {_now()}", file=file, flush=True
        )
        try:
            yield
        finally:
            file.truncate(0)


def _refuse_links(path: Path) -> None:
    """Return if no file that a run writes to is a link: a stranger's run directory would write to
    files of its new user.

    Raises:
        CheckpointError: naming the first.
    """
    for folder in (path, path / LOGS):
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if entry.is_symlink() and not entry.is_dir():
                raise CheckpointError(
                    "a file of this run directory is a link, which the run would write through",
                    where=entry.path,
                    value=os.readlink(entry.path),
                    remedy="put the file itself there, or remove the link",
                )


def _refuse_lease(path: Path, *, locks: bool) -> None:
    """Return if no attempt of another machine, or of any where there are no ``locks``, renews its
    lease.

    An attempt of this very Slurm job may: it has not yet noticed that the job was started anew, and
    is fenced off.
    """
    attempt, here = fence.newest(path), allocation()
    owner = attempt.owner() if attempt else None
    if attempt is None or owner is None or (here and owner.job == here.job_id):
        return
    if locks and owner.host == socket.gethostname():  # the kernel would know
        return
    if attempt.alive():
        raise _at_work(path, str(owner))


def _at_work(path: Path, who: str) -> CheckpointError:
    return CheckpointError(
        "another job is at work in this run directory",
        where=path,
        value=who,
        remedy="wait for it, stop it, or start this one under another run.name",
    )


def take(path: Path, *, launcher: str, queued: tuple[float, float] = (0.0, 0.0)) -> fence.Fence:
    """Return the attempt that begins now, as ``take_attempt``. Call it under ``locked``."""
    attempt = take_attempt(path, launcher=launcher, queued=queued)
    # of the attempt before, whose end was taken from them
    shutil.rmtree(path / HEARTBEATS, ignore_errors=True)
    return attempt


def record(loaded: Loaded[TrainConfig], *, launcher: str, procs: int) -> Path:
    """Return the resolved config's path, after writing it and this attempt's entry. Call it under
    ``locked``.

    Raises:
        CheckpointError: as ``compare``: what was written between a first look and the lock counts.
    """
    path = loaded.config.run_dir
    compare(loaded.config)
    old = load_config(path / CONFIG).config if is_run(path) else None
    changes = differences(old, loaded.config) if old else []
    # first, so that a replaced value is on record
    enter(
        path,
        launcher=launcher,
        procs=procs,
        changes=[str(difference) for difference in changes],
        sources=loaded.sources,
    )
    write_atomically(path / CONFIG, to_yaml(loaded.config).encode())
    make_secret(path)
    _note_permission(path, loaded.config)
    return path / CONFIG


def enter(
    path: Path,
    *,
    launcher: str,
    procs: int,
    changes: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
) -> None:
    """Write the entry of an attempt to environment.json. Call it under ``locked``."""
    here = allocation()
    entry = {
        "started": _now(),
        "launcher": launcher,
        "procs": procs,
        "job": here and asdict(here),
        **describe(path),
        "changes": [*changes],
        "sources": {**(sources or {})},
    }
    text = json.dumps([*attempts(path), entry], indent=1, ensure_ascii=False, default=str)
    write_atomically(path / ENVIRONMENT, text.encode())


def _note_permission(path: Path, config: TrainConfig) -> None:
    """Note in the user's home what this attempt may run, so that the run goes on without its being
    said again.
    """
    if permission.asked(config):
        file, note = permission.note_of(path, config)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(note.as_dict()).encode(), private=True)
        except (OSError, DataError):
            logger.info(
                f"notice: {file.parent} cannot be written: say "
                f"{' '.join(f'{key}=true' for key in permission.asked(config))} "
                "again when this run goes on"
            )


def before_attempt(path: Path) -> tuple[bytes | None, int]:
    """Return the config of a run directory (None: there is none yet) and how many bytes the run has
    logged.
    """
    config = path / CONFIG
    return config.read_bytes() if config.is_file() else None, _logged_bytes(path)


def restore_if_refused(path: Path, before: tuple[bytes | None, int], *, code: int) -> None:
    """Give a run its config of ``before`` back, if the attempt that ended with ``code`` was refused
    before its first logged step.
    """
    config, logged = before
    if code == EXIT_USER_ERROR and config is not None and logged == _logged_bytes(path):
        write_atomically(path / CONFIG, config)


def made_by_alone(path: Path, *, launcher: str) -> None:
    """Return if every attempt in a run directory was made by ``launcher``.

    Raises:
        CheckpointError: if another one has trained there.
    """
    launchers = {str(attempt.get("launcher")) for attempt in attempts(path)}
    if launchers != {launcher}:
        raise CheckpointError(
            f"this is not a run of the {launcher} launcher, which starts anew each time",
            where=path,
            value=sorted(launchers),
            remedy="run.name=... gives the debug run another name; its directory ends in -debug",
        )


def attempts(path: Path) -> list[dict[str, object]]:
    """Return the entries of ``environment.json``, oldest first.

    Raises:
        CheckpointError: if it is damaged.
    """
    file = path / ENVIRONMENT
    if not file.is_file():
        return []
    return load(
        file,
        list[dict[str, object]],
        what="the record of earlier attempts",
        remedy="restore it, or move it away: the run itself does not need it",
        error=CheckpointError,
    )


def _logged_bytes(path: Path) -> int:
    metrics = path / METRICS
    return metrics.stat().st_size if metrics.is_file() else 0


def _tokenizer_digests(path: Path, tokenizer: str) -> list[str]:
    """Return the digest that the newest checkpoint of the run speaks of, and that of the folder
    ``tokenizer`` if it is another.
    """
    newest = layout.newest_state(path)
    then = newest.tokenizer_digest if newest else ""
    return (
        list(dict.fromkeys([then, tokenizer_digest(tokenizer)]))
        if then and Path(tokenizer).is_dir()
        else []
    )


def _other_name(config: TrainConfig) -> str:
    """Return an override that names a run directory which is not there yet."""
    number = 2
    while (config.run.root / f"{config.run.name}-{number}").exists():
        number += 1
    return f"run.name={config.run.name}-{number}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
