"""The local launcher: one plain process a rank on this machine, watched until all have ended.

Ctrl-C and SIGTERM reach every rank once, as SIGTERM: they save together and leave with 75. A second
Ctrl-C kills. Ranks have process groups of their own, and the kernel kills them when the launcher
dies.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hfscale.checks.start import refuse, refuse_limits
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import Place, World, allocation, available_cores, listen
from hfscale.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR, ConfigError
from hfscale.log import logger
from hfscale.run_files import LOGS, RANK_LOG
from hfscale.worker import job_of
from launch import run_dir
from launch.attempt import begun
from launch.interpreter import python
from launch.job import Job
from launch.queue import refuse_holder
from launch.start import Start

if TYPE_CHECKING:
    from types import FrameType

GRACE_S = 10.0  # what the other ranks get to end by themselves after one has failed
TAIL_LINES = 30
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


def launch(job: Job) -> int:
    """Return the exit code of ``job`` on this machine: that of the rank that failed first, or 0.

    Raises:
        UserError: for what can be refused before a process is started.
    """
    gpus = gpu_count()
    procs = job.procs or gpus or min(2, available_cores())
    if 0 < gpus < procs:
        raise ConfigError(
            f"{procs} ranks on {gpus} GPUs",
            where="--procs",
            value=procs,
            remedy=f"--procs {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to {job.does} on "
            "the CPU",
        )
    refuse_limits()
    start = Start(job, procs=procs, gpus=gpus > 0)
    # what takes seconds the ranks find out themselves
    told = refuse(start) if job.dry_run else start.config()
    said = [*(told or ()), *unused_allocation()]
    try:
        listener = listen(job.port or 0)  # ours from now on: nobody can take the port
    except OSError as error:
        raise ConfigError(
            f"the port cannot be used: {error.strerror}",
            where="--port",
            value=job.port,
            remedy="leave --port out: a free one is found",
        ) from None
    for line in said:
        logger.info(f"notice: {line}")
    if job.dry_run:
        with listener:
            print(_plan(job, procs, listener.getsockname()[1]))
        return EXIT_DONE
    with listener:
        code = _attempt(job, procs, listener, "GPUs" if gpus else "the CPU")
    if line := job.told(code):
        logger.info(line)
    return code


def _attempt(job: Job, procs: int, listener: socket.socket, device: str) -> int:
    """Return the exit code of one attempt of ``job``, whose folder is held meanwhile."""
    before = run_dir.before_attempt(job.folder)
    with begun(job, launcher="local", procs=procs) as attempt:
        ranks = "ranks" if procs > 1 else "rank"
        logger.info(f"{job.place[0]} {job.folder}, {procs} {ranks} on {device}")
        if job.curves:
            logger.info(tensorboard_line(job.curves))
        with attempt.kept(leave=False):  # rank 0 leaves, and the others with it
            code = run_ranks(
                python(job.worker, job.file),
                procs=procs,
                listener=listener,
                logs=job.folder / LOGS,
                attempt=attempt.number,
            )
        attempt.end(code)
        run_dir.restore_if_refused(job.folder, before, code=code)
    return code


def compute(job: Job) -> int:
    """Return as ``launch``; what one process is to do, this one does.

    Raises:
        UserError: in this process, for what the job refuses.
    """
    if job.procs != 1:
        return launch(job)
    refuse_holder(job.folder)
    job.record(launcher="local", procs=1)
    done = job_of(job.config)(job.config, World(), StopRequest())
    code = EXIT_DONE if done else EXIT_STOPPED
    if line := job.told(code):
        logger.info(line)
    return code


def unused_allocation() -> list[str]:
    """Return a notice if this process is in a Slurm allocation which these ranks will not use, or
    not all of.
    """
    here = allocation()
    if here is None:
        return []
    inside = "SLURMD_NODENAME" in os.environ
    if inside and here.nodes == 1:
        return []
    where = (
        f"one of the {here.nodes} nodes" if inside else "this machine, which is none of its nodes"
    )
    return [
        f"in the allocation {here.job_id} ({here.node_list}) these ranks run on {where}; "
        f"--launcher slurm uses all of it"
    ]


# ------------------------------------------------------------------------------------------ machine
def gpu_count() -> int:
    """Return the GPUs that torch may use; torch is asked only where a driver is, because importing
    it takes a second.
    """
    if not any(Path(device).exists() for device in _ACCELERATORS):
        return 0
    import torch

    return torch.cuda.device_count()


def tensorboard_line(command: str) -> str:
    """Return the ``command`` that shows a run's curves, and the tunnel to it when this is a remote
    machine.
    """
    line = f"curves: {command}"
    if "SSH_CONNECTION" in os.environ:
        line += f"   (from your machine: ssh -L 6006:localhost:6006 {socket.gethostname()})"
    return line


def _plan(job: Job, procs: int, port: int) -> str:
    """Return what a real start would do."""
    state = "goes on" if job.file.is_file() else "new"
    lines = [job.fit(procs), f"{job.place[0]} {job.folder} ({state})"]
    for rank in range(procs):
        place = World(Place(rank, procs), rank, procs, master_port=port).export()
        command = shlex.join([sys.executable, "-m", job.worker, str(job.file)])
        lines.append(" ".join([*(f"{name}={value}" for name, value in place.items()), command]))
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- ranks
@dataclass
class Rank:
    """One started process, with its log file and the byte where this attempt begins in it."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    begins: int
    tees: list[subprocess.Popen[bytes]]  # that copy its output to the console and to the log

    def tail(self) -> str:
        with open(self.log, "rb") as file:
            file.seek(self.begins)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with whatever it started


def run_ranks(
    command: Sequence[str],
    *,
    procs: int,
    listener: socket.socket,
    logs: Path,
    attempt: int = 0,
) -> int:
    """Return the exit code of ``procs`` processes of ``command``, which meet where ``listener``
    listens: it is rank 0's then.

    Each has its log; rank 0's goes to the console as well.
    """
    logs.mkdir(exist_ok=True)
    if shutil.which("tee") is None:
        raise ConfigError(
            "there is no `tee`, which copies what rank 0 says to its log",
            where="environment, PATH",
            value=os.environ.get("PATH", ""),
            remedy="add the folder that holds it, /usr/bin as a rule",
        )
    port, handle = listener.getsockname()[1], listener.fileno()
    ranks: list[Rank] = []
    try:
        with _forwarding(ranks) as asked:
            for number in range(procs):
                world = World(Place(number, procs), number, procs, master_port=port)
                world = replace(world, attempt=attempt, listen_fd=None if number else handle)
                ranks.append(_start(command, world, logs))
                listener.close()  # who knocks after rank 0 has gone hears so
                if asked:
                    ranks[-1].process.terminate()
            failed = _watch(ranks)
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.kill()
                rank.process.wait()
            for tee in rank.tees:
                with suppress(subprocess.TimeoutExpired):
                    tee.wait(timeout=2.0)  # a grandchild may keep the pipe open
    return _verdict(failed, ranks, asked)


def _start(command: Sequence[str], world: World, logs: Path) -> Rank:
    path = logs / RANK_LOG.format(world.all.rank)
    threads = max(1, available_cores() // world.all.size)
    env = (
        {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        | dict(os.environ)
        | world.export()
    )
    launcher = os.getpid()
    # a console that goes away does not stop the run
    tee = [
        "tee",
        "--append",
        "--output-error=warn",
        str(path),
    ]
    with open(path, "ab") as file:
        begins = file.tell()
        tees = [
            subprocess.Popen(
                tee,
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            for console in (1, 2)
            if world.all.rank == 0
        ]
        out, err = [tee.stdin for tee in tees] or (file, file)
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=lambda: die_with(launcher),
            pass_fds=[] if world.listen_fd is None else [world.listen_fd],
        )
    for pipe in (tee.stdin for tee in tees if tee.stdin):
        pipe.close()
    return Rank(world.all.rank, process, path, begins, tees)


def die_with(parent: int) -> None:
    """Have the kernel kill this process, a child of ``parent``, when that dies."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


@contextmanager
def _forwarding(ranks: list[Rank]) -> Iterator[list[int]]:
    """Pass the first request to stop on to every rank, and kill them at a second Ctrl-C. Yields the
    signals seen so far.
    """
    asked: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) == 1:
            logger.info(
                f"{signal.Signals(number).name}: asking the ranks to save and stop after this "
                "step (Ctrl-C again kills them)"
            )
        for rank in ranks:
            if len(asked) == 1:
                rank.process.terminate()
            elif number == signal.SIGINT:
                rank.kill()

    # nohup asks for SIGHUP to be ignored
    before = {
        number: signal.signal(number, handle)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: Sequence[Rank]) -> Rank | None:
    """Return the rank that failed first, once all have ended; the others are killed ``GRACE_S``
    after it.
    """
    failed, deadline = None, float("inf")
    while running := [rank for rank in ranks if rank.process.poll() is None]:
        if failed is None and (down := [rank for rank in ranks if rank.process.returncode]):
            # a killed one first
            failed = min(down, key=lambda rank: rank.process.returncode)
            deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for rank in running:
                rank.kill()
        time.sleep(0.02)
    return failed or next((rank for rank in ranks if rank.process.returncode), None)


def _verdict(failed: Rank | None, ranks: Sequence[Rank], asked: Sequence[int]) -> int:
    """Return the exit code to pass on, after saying which rank failed and what it said last."""
    if failed is None:
        return EXIT_DONE
    code = failed.process.returncode
    if code == -signal.SIGTERM and asked:
        return EXIT_STOPPED  # it had not come to where it listens, so there was nothing to save
    if code == EXIT_STOPPED or (
        code == EXIT_USER_ERROR and ranks[0].process.returncode == EXIT_USER_ERROR
    ):
        return code  # said on the console already
    if code < 0:
        guess = " (out of memory? see `dmesg`)" if code == -signal.SIGKILL and not asked else ""
        reason = f"was killed by {signal.Signals(-code).name}{guess}"
        code = 128 - code
    else:
        reason = f"ended with exit code {code}"
    last = "" if failed.number == 0 else f"; its last lines:\n{failed.tail()}"
    logger.error(f"rank {failed.number} {reason}; log: {failed.log}{last}")
    return code
