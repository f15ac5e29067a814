"""A real Slurm cluster on this machine: munged, slurmctld and four slurmd nodes with host names and
fake GPUs of their own, as ``launch/private_slurm.py`` makes one.

    def test_a_job(cluster):  # a session fixture: one cluster a pytest worker, started in a second
        job = cluster.sbatch("--nodes=2", script)
        cluster.wait(job)

Three partitions, ``low`` < ``normal`` < ``high``: a job in a higher one preempts those below it.
Needs root (host names are made with ``unshare``) and the packages of ``tests/apt-packages.txt``.
Nothing of it outlives the session, Ctrl-C, or a pytest that is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launch import private_slurm
from launch.private_slurm import Machines, PrivateSlurm, can_name_nodes, processes_of

# CPUs are only counted, not bound: every machine can run every test
NODES, GPUS, CPUS = (
    ("n1", "n2", "n3", "n4"),
    2,
    8,
)
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
)
MORE = """\
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobSubmitPlugins=lua"""
PARTITIONS = """\
PartitionName=low Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 GraceTime=30
PartitionName=normal Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=10 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=100 PreemptMode=OFF"""
NO_ACCOUNT = """\
function slurm_job_submit(job, partitions, uid)  -- refusing accounts takes a data base, or this
    if job.account == "overdrawn" then return 2045 end  -- ESLURM_INVALID_ACCOUNT
    return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid) return slurm.SUCCESS end
return slurm.SUCCESS
"""


def missing() -> str | None:
    """Return why no cluster can run here, or None."""
    if absent := private_slurm.missing():
        return f"no {', '.join(absent)}: apt-get install the packages of tests/apt-packages.txt"
    if not can_name_nodes():
        return "a test cluster needs root: its nodes have host names of their own"
    return None


class Cluster(PrivateSlurm):
    """A running cluster; every client must be started with ``env``."""

    def __init__(self) -> None:
        super().__init__(
            Machines(NODES, cpus=CPUS, memory_mb=4000, gpus=GPUS, partitions=PARTITIONS)
        )

    def more(self) -> str:
        """Let partitions preempt, and an account be refused."""
        (self.folder / "job_submit.lua").write_text(NO_ACCOUNT)
        return MORE

    def devices(self, number: int) -> Sequence[str]:
        """Return character devices that all nodes have: from regular files Slurm names no GPU."""
        files = [self.folder / f"gpu{gpu}" for gpu in range(GPUS)]
        for file in files:
            if not file.exists():
                subprocess.run(["mknod", file, "c", "1", "3"], check=True)
        return [*map(str, files)]

    def stop_controller(self) -> None:
        """End slurmctld alone, in order: jobs go on, and nobody answers."""
        [pid] = [pid for pid in processes_of(self.folder) if _command(pid)[0] == "slurmctld"]
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: _command(pid)[0] != "slurmctld")

    def kill_node(self, node: str) -> None:
        """Kill -9 everything that runs on a node, its slurmd first: what a power failure leaves."""
        pids = [
            pid
            for pid in processes_of(self.folder)
            if _command(pid)[:4] == ["slurmd", "-D", "-N", node]
        ]
        there = os.readlink(f"/proc/{pids[0]}/ns/uts")  # the host name is the node's
        for pid in pids + processes_of(self.folder):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/uts") == there:
                    os.kill(pid, signal.SIGKILL)

    # -------------------------------------------------------------------------------------- clients
    def run(
        self, *command: object, check: bool = True, timeout_s: float = 60.0, **options: Any
    ) -> str:
        """Return what a client prints (stdout and stderr)."""
        done = subprocess.run(
            [*map(str, command)],
            env=options.pop("env", self.env),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
            **options,
        )
        assert done.returncode == 0 or not check, f"{' '.join(map(str, command))}: {done.stdout}"
        return done.stdout

    def sbatch(self, *arguments: object, **options: Any) -> str:
        """Return the id of the job that was submitted."""
        return self.run("sbatch", "--parsable", *arguments, **options).strip().splitlines()[-1]

    def job(self, job: str) -> dict[str, str]:
        """Return what ``scontrol show job`` says, by name."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait(self, job: str, states: tuple[str, ...] = ENDED, *, timeout_s: float = 300.0) -> str:
        """Return the state of a job once it is one of ``states``."""
        wait_for(
            lambda: self.state(job) in states,
            timeout_s=timeout_s,
            every_s=0.3,
            what=lambda: (
                f"job {job} is not {' or '.join(states)}: {self.job(job)}\n{self.output(job)}"
            ),
        )
        return self.state(job)

    def ranks(self, job: str) -> dict[int, int]:
        """Return rank -> process of the Python processes of a job's step."""
        return {
            int(env["SLURM_PROCID"]): pid
            for pid, env in self.processes(job).items()
            if "SLURM_STEP_NUM_TASKS" in env and "python" in Path(_command(pid)[0]).name
        }

    def processes(self, job: str) -> dict[int, dict[str, str]]:
        """Return process -> environment of what runs for a job: its ranks, its script, and whatever
        they started.
        """
        found = {}
        for pid in processes_of(self.folder):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
                env = dict(pair.partition("=")[::2] for pair in text.split("\0"))
                if env.get("SLURM_JOB_ID") == job and not _command(pid)[0].startswith("slurmstepd"):
                    found[pid] = env
        return found

    def output(self, job: str) -> str:
        """Return what the job has printed so far."""
        file = Path(self.job(job).get("StdOut", ""))
        return file.read_text(errors="replace") if file.is_file() else ""


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """Yield a cluster, and end it."""
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.stop()


def wait_for(
    condition: Callable[[], object],
    *,
    timeout_s: float = 180.0,
    every_s: float = 0.02,
    what: Callable[[], str] = lambda: "it did not happen",
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(every_s)


def _command(pid: int) -> list[str]:
    """Return the words of a process's command; one empty word if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]
