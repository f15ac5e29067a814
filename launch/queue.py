"""What Slurm's queue says, asked with its own commands, and which job holds a run directory.
Nothing here submits.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from hfscale.dist.world import Allocation, allocation, gpus_here
from hfscale.errors import (
    EXIT_DONE,
    EXIT_UNHEALTHY,
    EXIT_USER_ERROR,
    CheckpointError,
    ConfigError,
)
from hfscale.log import logger
from hfscale.monitor.fence import newest
from hfscale.run_files import JOB

UNKNOWN = "Invalid job id specified"  # scontrol, of a job that has been forgotten
NEVER = ("presently disabled", UNKNOWN, "denied")  # scontrol, of a job that is not to be requeued
# by slurm/train.sbatch: what scontrol says of jobs
TOLD = "HFSCALE_TOLD"
ASKED = "hfscale asked of job "
FINAL = (EXIT_DONE, EXIT_USER_ERROR, EXIT_UNHEALTHY)  # a job does not come back after
ENDING_S, AGAIN_S = 180.0, 15.0  # what a job gets to end; between two tries to requeue
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED")
TIMEOUT_S = 60
ANSWER_S = 5.0  # to say what there is


def has_slurm() -> bool:
    """Return whether this machine can talk to a Slurm cluster."""
    return shutil.which("sbatch") is not None


def client(
    command: Sequence[str | Path], cwd: Path | None = None, *, timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Return a finished Slurm client; its exit code is not looked at. One that takes too long ends
    with 124, and says so on stderr.
    """
    words = list(map(str, command))
    try:
        return subprocess.run(
            words, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(
            words, 124, "", f"{words[0]} got no answer in {timeout_s:.0f} s"
        )


def queue_says(here: Allocation | None) -> tuple[bool, str]:
    """Return whether Slurm answers, where there is one, and what it says of the job ``here``, or
    offers.
    """
    if not has_slurm():
        return True, "none on this machine"
    command = ["sinfo", "-h", "-o", "%P (%D nodes with %G, up to %l)"]
    if here:
        command = ["squeue", "-h", "-j", here.job_id, "-o", "job %i on %N, time left: %L"]
    done = client(command, timeout_s=ANSWER_S)
    if done.returncode == 0:
        return True, "; ".join(done.stdout.splitlines())
    return False, "; ".join(done.stderr.strip().splitlines()[-1:])  # what comes before leads there


def facts(job: str) -> dict[str, str] | None:
    """Return what ``scontrol show job`` says of a job by name: nothing once Slurm has forgotten it,
    None where nobody answers.

    In a container without Slurm's commands slurm/train.sbatch has asked outside: see ``TOLD``.
    """
    if not job:
        return {}
    if shutil.which("scontrol"):
        done = client(["scontrol", "show", "job", job])
        said = done.stdout + done.stderr
    else:
        said = asked().get(job, "")
    if UNKNOWN in said:
        return {}
    return dict(re.findall(r"(\S+?)=(\S*)", said)) if "JobId=" in said else None


def queue_times(job: str) -> tuple[float, float]:
    """Return when a job was submitted, or came back into the queue, and when it got its nodes: in
    seconds of the epoch, 0 where Slurm does not say.
    """
    told = facts(job) or {}

    def moment(name: str) -> float:
        try:
            return datetime.fromisoformat(told.get(name, "")).timestamp()
        except ValueError:  # "Unknown"
            return 0.0

    return moment("SubmitTime"), moment("StartTime")


def asked() -> dict[str, str]:
    """Return what slurm/train.sbatch was told of each job that it asked for."""
    answers = os.environ.get(TOLD, "").split(ASKED)[1:]
    return {job: said for job, _, said in (answer.partition("\n") for answer in answers)}


def ranks_per_node(here: Allocation) -> int:
    """Return how many ranks each node of a job gets: as many as tasks were asked for, else one a
    GPU, else one.

    Slurm is asked what the job asked for: its variables of that kind are handed on from one
    allocation to jobs that are submitted in it.

    Raises:
        ConfigError: if the tasks do not divide among the nodes.
    """
    told = facts(here.job_id) or {}
    if not told:
        return here.tasks_per_node
    nodes, tasks = here.nodes, int(told.get("NumTasks", "1"))
    if (each := told.get("NtasksPerN:B:S:C", "0").partition(":")[0]) not in ("0", "*"):
        return int(each)
    if tasks > nodes:
        if tasks % nodes:
            raise ConfigError(
                "ranks must be equally many on each node",
                where="sbatch --ntasks",
                value=f"{tasks} tasks on {nodes} nodes",
                remedy="say --ntasks-per-node=N instead",
            )
        return tasks // nodes
    gpus = re.findall(
        r"gres[:/]gpu(?::[A-Za-z][\w.-]*)?(?:[:=](\d+))?", told.get("TresPerNode", "")
    )
    return sum(int(count or 1) for count in gpus) or gpus_here() or here.gpus_per_node or 1


def cores_per_rank(here: Allocation, ranks: int) -> int:
    """Return the CPUs of a rank: those that were asked for, else its part of the node that has
    fewest.
    """
    asked = int((facts(here.job_id) or {}).get("CPUs/Task", "1"))
    return asked if asked > 1 else max(1, here.cpus_per_node // ranks)


def longest(partition: str | None) -> str:
    """Return the time limit of a partition, or of the default one, as Slurm writes it; "infinite"
    where there is none or nobody knows.
    """
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
    """Return if no other job waits or works in ``run_dir``; one that is just ending is waited for.

    Raises:
        CheckpointError: naming the job that does; ``NoAnswer`` if nobody says whether it does.
    """
    file, here = run_dir / JOB, allocation()
    job = file.read_text().strip() if file.is_file() else ""
    if not job or (here is not None and job in (here.job_id, here.array_id)):
        return
    told, until = facts(job), time.monotonic() + ENDING_S
    while told and told.get("JobState") == "COMPLETING" and time.monotonic() < until:
        if until - time.monotonic() > ENDING_S - 1:
            logger.info(
                f"job {job}, which holds this run directory, is just ending: waiting for it"
            )
        time.sleep(1)
        told = facts(job)
    if told is None:
        attempt = newest(run_dir)
        owner = attempt.owner() if attempt else None
        if attempt and owner and owner.job == job and attempt.ended() in FINAL:
            return  # it said so itself, and does not come back
        raise NoAnswer(job, run_dir)
    mine = here is not None and here.job_id == told.get("JobId")  # an array's task has two names
    if told.get("JobState") in ALIVE and not mine:
        raise CheckpointError(
            "another Slurm job holds this run directory",
            where=run_dir,
            value=f"job {job}",
            remedy=f"wait for it, stop it with `scancel {job}`, or start this one under "
            "another run.name",
        )


class NoAnswer(CheckpointError):
    """Whether ``job`` still holds a run directory is not known: then it does."""

    def __init__(self, job: str, run_dir: Path) -> None:
        self.job = job
        super().__init__(
            "a Slurm job holds this run directory, or held it last, and Slurm does not answer "
            "whether it has ended",
            where=run_dir,
            value=f"job {job}",
            remedy=f"try again where `scontrol show job {job}` answers; if you know that it "
            "has ended: "
            f"rm {shlex.quote(str(run_dir / JOB))}",
        )


def requeue(job: str) -> bool:
    """Return True once Slurm has put a job back into the queue, tried for as long as it lasts;
    False if it is not to come back.
    """
    while True:
        done = client(["scontrol", "requeue", job])
        if done.returncode == 0:
            return True
        if any(words in done.stderr for words in NEVER):
            logger.info(f"job {job} does not go back into the queue: {done.stderr.strip()}")
            return False
        logger.warning(f"job {job} cannot be requeued yet: {done.stderr.strip()}; trying again")
        time.sleep(AGAIN_S)


def hold(run_dir: Path, job: str) -> None:
    """Write down that ``job`` holds ``run_dir``. Two jobs that come at once see each other: the
    file is made by one alone.

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
            if old == job or _same(old, job):
                return
            refuse_holder(run_dir)
            file.unlink(missing_ok=True)


def _same(job: str, other: str) -> bool:
    """Return whether two names are of one job: a task of an array has two."""
    named = [(facts(name) or {}).get("JobId") for name in (job, other)]
    return named[0] is not None and named[0] == named[1]


def seconds(limit: str) -> int:
    """Return a time limit as Slurm writes it ("90" minutes, "1:30:00", "2-12") in seconds."""
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, rest_s = (
        [*parts, 0, 0][:3] if days else [0, *parts, 0][:3] if len(parts) < 3 else parts
    )
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest_s
