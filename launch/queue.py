"""What Slurm's queue says, asked with its own commands, and which job holds a run directory. Nothing here submits."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hfscale.dist.world import allocation
from hfscale.errors import CheckpointError
from hfscale.worker import JOB

ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED")
TIMEOUT_S = 60


def has_slurm() -> bool:
    """Return whether this machine can talk to a Slurm cluster."""
    return shutil.which("sbatch") is not None


def client(
    command: Sequence[str | Path], cwd: Path | None = None, *, timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Return a finished Slurm client; its exit code is not looked at. One that takes too long ends with 124, and says so on stderr."""
    words = list(map(str, command))
    try:
        return subprocess.run(
            words, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(
            words, 124, "", f"{words[0]} got no answer in {timeout_s:.0f} s"
        )


def facts(job: str) -> dict[str, str]:
    """Return what ``scontrol show job`` says of a job by name; nothing once Slurm has forgotten it."""
    return (
        dict(re.findall(r"(\S+?)=(\S*)", client(["scontrol", "show", "job", job]).stdout))
        if job and has_slurm()
        else {}
    )


def longest(partition: str | None) -> str:
    """Return the time limit of a partition, or of the default one, as Slurm writes it; "infinite" where there is none or nobody knows."""
    rows = [
        line.partition("|") for line in client(["sinfo", "-h", "-o", "%P|%l"]).stdout.splitlines()
    ]
    return next(
        (
            limit
            for name, _, limit in rows
            if (name.rstrip("*") == partition if partition else name.endswith("*"))
        ),
        "infinite",
    )


def refuse_holder(run_dir: Path) -> None:
    """Return if no other job waits or works in ``run_dir``.

    Raises:
        CheckpointError: naming the job that does.
    """
    file, here = run_dir / JOB, allocation()
    job = file.read_text().strip() if file.is_file() else ""
    told = facts(job)
    mine = here is not None and here.job_id in (
        job,
        told.get("JobId"),
    )  # of an array it is known by two names
    if told.get("JobState") in ALIVE and not mine:
        raise CheckpointError(
            "another Slurm job holds this run directory",
            where=run_dir,
            value=f"job {job}",
            remedy=f"wait for it, stop it with `scancel {job}`, or start this one under another run.name",
        )


def hold(run_dir: Path, job: str) -> None:
    """Write down that ``job`` holds ``run_dir``. Two jobs that come at once see each other: the file is made by one alone.

    Raises:
        CheckpointError: if another one holds it.
    """
    file = run_dir / JOB
    while True:
        try:
            with open(file, "x") as new:
                new.write(job)
            return
        except FileExistsError:
            old = file.read_text().strip()
            if old == job or (
                (known := facts(old).get("JobId")) is not None and known == facts(job).get("JobId")
            ):
                return
            refuse_holder(run_dir)
            file.unlink(missing_ok=True)


def seconds(limit: str) -> int:
    """Return a time limit as Slurm writes it ("90" minutes, "1:30:00", "2-12") in seconds."""
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, rest_s = (
        [*parts, 0, 0][:3] if days else [0, *parts, 0][:3] if len(parts) < 3 else parts
    )
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest_s
