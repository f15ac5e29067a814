"""What Slurm's queue says, asked with its own commands. Nothing here submits."""
from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hfscale.config.schema import RunConfig
from hfscale.dist.world import Allocation, allocation
from hfscale.errors import CheckpointError, ConfigError

JOB = "job"  # in a run directory: the id of the job that holds it, or held it last
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED")
TIMEOUT_S = 60


def has_slurm() -> bool:
    """Return whether this machine can talk to a Slurm cluster."""
    return shutil.which("sbatch") is not None


def client(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Return a finished Slurm client; its exit code is not looked at.

    Raises:
        ConfigError: if it does not answer, as when slurmctld is down.
    """
    try:
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL,
                              check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError("Slurm does not answer", where=command[0], value=str(error), remedy="see whether `sinfo` works here") from None


def facts(job: str) -> dict[str, str]:
    """Return what ``scontrol show job`` says of a job by name; nothing once Slurm has forgotten it."""
    if not has_slurm():
        return {}
    return dict(re.findall(r"(\S+?)=(\S*)", client(["scontrol", "show", "job", job]).stdout))


def holder(run_dir: Path) -> str | None:
    """Return the job that waits or works in a run directory and is not this one, or None."""
    file = run_dir / JOB
    job = file.read_text().strip() if file.is_file() else ""
    here = allocation()
    told = facts(job) if job else {}
    mine = here is not None and here.job_id in (job, told.get("JobId"))  # of an array it is known by two names
    return job if not mine and told.get("JobState") in ALIVE else None


def refuse_holder(run_dir: Path) -> None:
    """Return if no other job holds ``run_dir``.

    Raises:
        CheckpointError: naming the job that does.
    """
    if job := holder(run_dir):
        raise CheckpointError("another Slurm job holds this run directory", where=run_dir, value=f"job {job}",
                              remedy=f"wait for it, stop it with `scancel {job}`, or start this one under another run.name")


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
            if old == job or ((known := facts(old).get("JobId")) is not None and known == facts(job).get("JobId")):
                return
            refuse_holder(run_dir)
            file.unlink(missing_ok=True)


def refuse_too_many_restarts(here: Allocation, config: RunConfig) -> None:
    """Return if a job may start again.

    Raises:
        ConfigError: if it did so too often.
    """
    if here.restarts > config.cluster.max_restarts:
        raise ConfigError(f"job {here.job_id} was restarted {here.restarts} times", where="cluster.max_restarts",
                          value=config.cluster.max_restarts, remedy="see why in the logs; then submit it again, or raise the limit")


def seconds(limit: str | None) -> int | None:
    """Return a time limit as Slurm writes it ("90", "1:30:00", "2-12") in seconds; None where there is none."""
    if not limit or not (found := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)):
        return None
    days, *parts = (int(part) if part else None for part in found.groups())
    numbers = [part or 0 for part in parts]
    if days is None and parts[1] is None:
        numbers = [0, numbers[0], 0]  # minutes
    elif days is None and parts[2] is None:
        numbers = [0, *numbers[:2]]  # minutes:seconds
    return (days or 0) * 86400 + numbers[0] * 3600 + numbers[1] * 60 + numbers[2]


def partitions() -> dict[str, tuple[str, str]]:
    """Return name -> (what it offers in words, its time limit); the default one ends in ``*``."""
    lines = client(["sinfo", "-h", "-o", "%P|%l|%D|%G"]).stdout.splitlines()
    fields = [line.split("|") for line in lines if line.count("|") == 3]
    return {name: (f"{name} ({nodes} nodes with {gres}, up to {limit})", limit) for name, limit, nodes, gres in fields}
