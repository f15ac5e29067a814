"""This process's place among the ranks of a job: the only file that reads the world from the
environment.

Every launcher starts ranks with torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
...); srun's SLURM_* ones are understood too, and a process with neither is a world of one.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

from hfscale.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PORTS = range(12_000, 30_000)
LISTEN_FD = "HFSCALE_LISTEN_FD"  # of rank 0: the socket that its launcher listens on for it
LOOPBACK = ("127.0.0.1", "localhost")
ATTEMPT = "HFSCALE_ATTEMPT"
HERE = "ranks of this node"


@dataclass(frozen=True)
class Place:
    """Where a rank stands among those that do one thing together."""

    rank: int = 0  # counted from 0
    size: int = 1  # how many they are
    group: ProcessGroup | None = None  # torch's group of them; None: everybody


@dataclass(frozen=True)
class World:
    """The places of a rank. Whoever asks for one says which is meant: ``all`` agree, save, beat and
    end together; ``data`` have rows of their own; those of ``sequence`` share each row, those of
    ``tensor`` each weight.
    """

    all: Place = Place()
    local_rank: int = 0  # of those on this node
    local_ranks: int = 1  # how many there are on this node
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # 0: a world of one picks a free port
    listen_fd: int | None = None  # rank 0: an open socket that listens there already
    secret: str = field(default="", repr=False)  # what every rank of the job knows, and nobody else

    @property
    def data(self) -> Place:
        """The place among ranks that read different rows, whose gradients are averaged."""
        return self.all

    @property
    def sequence(self) -> Place:
        """The place among ranks that have parts of the same rows: each is alone so far."""
        return Place()

    @property
    def tensor(self) -> Place:
        """The place among ranks that have parts of the same weights: each is alone so far."""
        return Place()

    @property
    def on_loopback(self) -> bool:
        """Whether all ranks are on this machine, and say so."""
        return self.master_addr in LOOPBACK

    def sharing(self, secret: str) -> World:
        """Return the same place in a world whose ranks prove to each other that they know
        ``secret``.
        """
        return replace(self, secret=secret)

    def at(self, port: int) -> World:
        """Return the same place in a world that meets at ``port``."""
        return replace(self, master_port=port)

    attempt: int = 0  # of the run, as monitor/fence.py counts them; 0: the launcher took none

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> World:
        """Return the place that torchrun's or Slurm's variables give, else a world of one.

        Raises:
            ConfigError: if they contradict each other.
        """
        attempt = given_attempt(env)
        if "RANK" in env:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        elif copies(env) > 1:  # a batch script has the other variables too, and is no rank
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", HERE)
            # not SLURM_NTASKS_PER_NODE alone: it is handed on from one allocation to another
            tasks = counts(
                env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE", "1")
            )
            env = {**env, HERE: str(tasks[_number(env, "SLURM_NODEID", "0") % len(tasks)])}
        else:
            return cls(attempt=attempt)
        rank, size, local_rank, local_ranks = (
            _number(env, name, default) for name, default in zip(names, "0101", strict=True)
        )
        if not 0 <= rank < size or "MASTER_PORT" not in env:
            raise ConfigError(
                "the environment names no place in the world",
                where="environment",
                value={name: env.get(name) for name in (*names, "MASTER_ADDR", "MASTER_PORT")},
                remedy="start the job with `hfscale`, torchrun or srun, which set these variables",
            )
        return cls(
            Place(rank, size),
            local_rank,
            local_ranks,
            env.get("MASTER_ADDR", "127.0.0.1"),
            _number(env, "MASTER_PORT", "", most=65_535),
            _number(env, LISTEN_FD, "") if LISTEN_FD in env and rank == 0 else None,
            attempt=attempt,
        )

    def export(self) -> dict[str, str]:
        """Return the variables that DeepSpeed and torch expect of this place."""
        return {
            "RANK": str(self.all.rank),
            "WORLD_SIZE": str(self.all.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_ranks),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            **({} if self.listen_fd is None else {LISTEN_FD: str(self.listen_fd)}),
            **({ATTEMPT: str(self.attempt)} if self.attempt else {}),
        }


def given_attempt(env: Mapping[str, str] = os.environ) -> int:
    """Return which attempt of its run the launcher says that this process is of; 0 if it says
    nothing.
    """
    return _number(env, ATTEMPT, "0") if env.get(ATTEMPT) else 0


def without_place(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables for a process that is no rank of this world, nor of its Slurm job."""
    ours = {*World(listen_fd=0, attempt=1).export()}
    return {
        name: value
        for name, value in env.items()
        if name not in ours and not name.startswith(("SLURM_", "PMI", "SRUN_"))
    }


def copies(env: Mapping[str, str] = os.environ) -> int:
    """Return how many times srun started the command of this process, at once; 1 outside of any
    step.
    """
    return _number(env, "SLURM_STEP_NUM_TASKS", "1") if "SLURM_PROCID" in env else 1


def counts(text: str) -> list[int]:
    """Return a number for each node from what Slurm writes for all: "2(x3),1" is 2, 2, 2, 1."""
    if not re.fullmatch(r"\d{1,9}(\(x\d{1,6}\))?(,\d{1,9}(\(x\d{1,6}\))?)*", text):
        raise ConfigError(
            "these are no numbers for nodes",
            where="environment, SLURM_*_PER_NODE",
            value=text[:80],
            remedy="start the job with srun or sbatch, which set the variables of Slurm",
        )
    parts = [part.partition("(x") for part in text.split(",")]
    return [int(n) for n, _, times in parts for _ in range(int(times.rstrip(")") or 1))]


@dataclass(frozen=True)
class Allocation:
    """The Slurm job that this process runs in, and its rank if it is one."""

    job_id: str
    node_list: str
    nodes: int
    gpus_per_node: int  # that were asked for; else those of this node, if the job has it whole
    tasks_per_node: int  # as far as the environment tells: launch/queue.py asks Slurm
    restarts: int
    rank: int
    array_id: str  # its other name, if it is a task of an array
    cpus_per_node: int = 1  # of the node that has fewest


def allocation(env: Mapping[str, str] = os.environ) -> Allocation | None:
    """Return the Slurm job around this process, or None outside of any."""
    if "SLURM_JOB_ID" not in env:
        return None
    # on whole nodes SLURM_GPUS_ON_NODE counts those that nobody asked for
    asked = env.get("SLURM_GPUS_PER_NODE")
    gpus = _number(env, "SLURM_GPUS_PER_NODE", "0") if asked else gpus_here(env)
    return Allocation(
        env["SLURM_JOB_ID"],
        env.get("SLURM_JOB_NODELIST", ""),
        nodes=_number(env, "SLURM_JOB_NUM_NODES", "1"),
        gpus_per_node=gpus,
        tasks_per_node=_number(env, "SLURM_NTASKS_PER_NODE", str(gpus or 1)),
        restarts=_number(env, "SLURM_RESTART_COUNT", "0"),
        rank=_number(env, "SLURM_PROCID", "0"),
        array_id=f"{env.get('SLURM_ARRAY_JOB_ID', '')}_{env.get('SLURM_ARRAY_TASK_ID', '')}",
        cpus_per_node=min(counts(env.get("SLURM_JOB_CPUS_PER_NODE", "1"))),
    )


def _number(env: Mapping[str, str], name: str, default: str, *, most: int = 2**31) -> int:
    """Return the whole number that a variable says; of ``gpu:a100:4`` the 4.

    Raises:
        ConfigError: if it says none, or one beyond ``most``.
    """
    text = env.get(name, default)
    digits = text.strip().rpartition(":")[2]
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19 and int(digits) <= most):
        raise ConfigError(
            "a variable of the environment is no such number",
            where=f"environment, {name}",
            value=text[:80],
            remedy=f"unset {name}, or start the job with `hfscale`, torchrun or srun, which set it",
        )
    return int(digits)


def gpus_here(env: Mapping[str, str] = os.environ) -> int:
    """Return how many GPUs the job has on this node; 0 outside of a node, as in salloc's shell."""
    return _number(env, "SLURM_GPUS_ON_NODE", "0") if env.get("SLURM_GPUS_ON_NODE") else 0


def node_name(env: Mapping[str, str] = os.environ) -> str:
    """Return this machine's name, as Slurm knows it where it has one there."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def listen(port: int = 0) -> socket.socket:
    """Return a socket that listens on the loopback alone, at ``port`` or any free one: it is ours
    from now on, until it is closed.

    Raises:
        OSError: if ``port`` is taken.
    """
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def free_port(port: int = 0) -> int:
    """Return a TCP port that is free on this machine now: any, or ``port`` itself (OSError if it is
    not).

    Any: not one of those that systems give to whoever asks for none in particular (from 32,768 on,
    mostly). It is used only when the ranks have imported torch, and on a busy machine somebody
    would have been given it by then.
    """
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port or secrets.choice(PORTS)))
                return int(probe.getsockname()[1])
            except OSError:
                if port:
                    raise


def job_port(job_id: str) -> int:
    """Return where the ranks of a Slurm job meet: a port of its own, or the next one that nobody
    has on this node.
    """
    for port in count(10_000 + int(job_id) % 20_000):
        with suppress(OSError):
            return free_port(port)
    raise AssertionError


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
