"""The life of an attempt, the same for every launcher: the folder is held and gets what the ranks
read, the attempt gets a number, and in the end its code (``monitor/fence.py``).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfscale.dist.world import Allocation, allocation
from hfscale.errors import ConfigError
from hfscale.monitor.fence import Fence
from hfscale.records import Count, Record, load
from hfscale.run_files import CODE, LOGS, RESTARTS
from hfscale.shards.files import write_atomically
from launch import run_dir
from launch.job import Job
from launch.queue import hold, queue_times
from launch.share import ROOT, scripts_home

PACKAGES = ("hfscale", "launch")  # what a job's snapshot of the code has beside slurm/


class _Start(Record):
    """From which checkpoint a job began, and how often in a row."""

    job: str
    checkpoint: str | None
    restarts: Count


@contextmanager
def begun(job: Job, *, launcher: str, procs: int) -> Iterator[Fence]:
    """Give the attempt of ``job`` that begins now. Inside, no other launcher gets its folder.

    Raises:
        UserError: if another one has it, or the Slurm job around this was restarted too often.
    """
    with run_dir.locked(job.folder):
        here = allocation()
        if here and launcher == "slurm":
            take(job, here)
        elif here:
            hold(job.folder, here.job_id)  # the lock may not reach the other nodes
        prepare(job, launcher=launcher, procs=procs)
        queued = queue_times(here.job_id) if here and launcher == "slurm" else (0.0, 0.0)
        yield run_dir.take(job.folder, launcher=launcher, queued=queued)


def prepare(job: Job, *, launcher: str, procs: int, code: Path | None = None) -> None:
    """Return when the folder of ``job`` has what the ranks read, this attempt's entry, a folder for
    logs, and in ``code`` a snapshot of the code. It is held.

    Raises:
        ConfigError: if no log can be written there.
    """
    job.record(launcher=launcher, procs=procs)
    if code:
        scripts = scripts_home(job.cluster) / "slurm"
        for folder in (*(ROOT / name for name in PACKAGES), scripts):
            shutil.copytree(
                folder,
                code / folder.name,
                ignore=shutil.ignore_patterns("__pycache__"),
                dirs_exist_ok=True,
            )
    logs = job.folder / LOGS
    try:
        logs.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=logs).close()
    except OSError as error:
        raise ConfigError(
            f"no log can be written here: {error.strerror}",
            where=logs,
            remedy="mend the folder: Slurm would end the job without a word",
        ) from None


def code_folder(folder: Path) -> Path:
    """Return where the snapshot of the code of the next job in ``folder`` lies: it runs what was
    submitted, whatever becomes of the checkout.
    """
    return folder / CODE / str(len(run_dir.attempts(folder)) + 1)


def take(job: Job, here: Allocation) -> None:
    """Return if the Slurm job ``here`` now holds the folder of ``job``.

    Raises:
        UserError: if another one does, or this one was restarted too often without coming further.
    """
    hold(job.folder, here.job_id)
    checkpoint = job.reached()
    file = job.folder / RESTARTS
    last = load(file, _Start, what="the record of restarts") if file.is_file() else None
    again = last is not None and (last.job, last.checkpoint) == (here.job_id, checkpoint)
    start = _Start(
        job=here.job_id,
        checkpoint=checkpoint,
        restarts=last.restarts + 1 if last and again else 0,
    )
    if start.restarts > job.cluster.max_restarts:
        raise ConfigError(
            f"job {here.job_id} was restarted {start.restarts} times without getting beyond "
            f"{checkpoint or 'its start'}",
            where="cluster.max_restarts",
            value=job.cluster.max_restarts,
            remedy="see why in the logs; then submit it again, or raise the limit",
        )
    write_atomically(file, json.dumps(start.as_dict()).encode())
