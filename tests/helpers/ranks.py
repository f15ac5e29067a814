"""Functions run on several ranks at once, over real gloo groups that are started once and reused.

    from tests.helpers.ranks import run_ranks

    def total(x):  # a function of a test module: found again by its module's name in each rank
        t = torch.tensor(float(x)); torch.distributed.all_reduce(t); return t.item()

    def test_total():
        assert run_ranks(total, 2, 3) == [6.0, 6.0]

Starting a rank costs seconds (torch, deepspeed), so the ranks of each world size stay alive for the
pytest session. A call that fails or times out ends its ranks, and the next call starts new ones;
``fresh=True`` asks for new ones. Arguments and results travel as pickles: return plain values,
numpy arrays or CPU tensors.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from hfscale.dist.world import LISTEN_FD, listen

ROOT = Path(__file__).resolve().parents[2]
STACKS_TIMEOUT_S = 20.0
START_TIMEOUT_S = 300.0  # importing torch and meeting the others, on a busy machine
_groups: dict[int, RankGroup] = {}


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the message holds its traceback and output."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    fresh: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Return ``function(*args, **kwargs)`` of every rank, in the order of the ranks.

    ``function`` must be importable: at the top level of a test module or of hfscale. Inside it,
    RANK and the rest of the world's variables are set and the default process group (gloo) is up.

    Raises:
        RankFailure: with the traceback of the rank that failed first, or the stacks of all ranks
            after ``timeout_s``.
    """
    if fresh:
        close_ranks(world_size)
    group = _groups.get(world_size)
    if group is None or not group.alive():
        close_ranks(world_size)
        group = _groups[world_size] = RankGroup(world_size)
    try:
        return group.call(_address(function), args, kwargs, timeout_s=timeout_s)
    except BaseException:
        close_ranks(world_size)  # the other ranks may wait in a collective for ever
        raise


def close_ranks(world_size: int | None = None) -> None:
    """End the ranks of one world size, or all of them."""
    for size in list(_groups) if world_size is None else [world_size]:
        group = _groups.pop(size, None)
        if group is not None:
            group.close()


def _address(function: Callable[..., Any]) -> str:
    """Return ``module:name``, with a test or benchmark named by its place in the tree, whatever it
    is called here (``__main__``).
    """
    if "<locals>" in function.__qualname__:
        raise ValueError(
            f"{function.__qualname__} cannot be found by another process: define it at the top "
            "of its module"
        )
    file = Path(function.__code__.co_filename).resolve()
    ours = any(file.is_relative_to(ROOT / top) for top in ("tests", "benchmarks"))
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts) if ours else function.__module__
    return f"{module}:{function.__qualname__}"


class RankGroup:
    """``world_size`` processes that wait for calls."""

    def __init__(self, world_size: int) -> None:
        self.logs = [tempfile.TemporaryFile() for _ in range(world_size)]
        self._starts = [0] * world_size  # where each log's part of the current call begins
        self.pipes: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        listener = listen()
        for rank, log in enumerate(self.logs):
            here, there = Pipe()
            world = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(listener.getsockname()[1]),
                LISTEN_FD: str(listener.fileno()),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": os.pathsep.join(
                    filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
                ),
            }
            command = [sys.executable, "-m", "tests.helpers.rank_process", str(there.fileno())]
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | world,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[there.fileno(), *([] if rank else [listener.fileno()])],
                )
            )
            there.close()
            self.pipes.append(here)
        listener.close()  # it is rank 0's
        try:
            self._collect(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def alive(self) -> bool:
        """Return whether every rank still runs."""
        return all(process.poll() is None for process in self.processes)

    def call(
        self, address: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, timeout_s: float
    ) -> list[Any]:
        """Return the results of one call on every rank."""
        message = pickle.dumps((address, args, kwargs))
        self._starts = [log.seek(0, os.SEEK_END) for log in self.logs]
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send_bytes(message)
            except OSError as error:
                raise RankFailure(f"rank {rank} is gone\n{self._output(rank)}") from error
        return self._collect(timeout_s)

    def _collect(self, timeout_s: float) -> list[Any]:
        """Return one answer of every rank."""
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailure(self._stacks(sorted(waiting.values()), timeout_s))
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type, call-overload]
                results[rank] = self._receive(rank)
        return [results[rank] for rank in range(len(self.processes))]

    def _receive(self, rank: int) -> Any:
        try:
            ok, value = pickle.loads(self.pipes[rank].recv_bytes())
        except EOFError:
            code = self.processes[rank].wait()
            raise RankFailure(
                f"rank {rank} ended with exit code {code}\n{self._output(rank)}"
            ) from None
        if ok:
            return value
        raise RankFailure(f"rank {rank} raised\n{value}\n{self._output(rank)}")

    def _stacks(self, silent: list[int], timeout_s: float) -> str:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGQUIT)  # faulthandler writes all stacks into the log
        for rank, process in enumerate(self.processes):
            until = time.monotonic() + STACKS_TIMEOUT_S
            while (
                "most recent call first" not in self._output(rank)
                and process.poll() is None
                and time.monotonic() < until
            ):
                time.sleep(0.05)
        parts = [f"ranks {silent} did not answer in {timeout_s:g} s"]
        return "\n".join(parts + [self._output(rank) for rank in range(len(self.processes))])

    def _output(self, rank: int, *, limit: int = 6000) -> str:
        log = self.logs[rank]
        log.seek(self._starts[rank])
        text = log.read().decode(errors="replace")
        return f"--- output of rank {rank}\n{text[-limit:]}"

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.wait()
        for log in self.logs:
            log.close()


atexit.register(close_ranks)
