"""Many worlds of ranks, one after the other: a process imports torch and DeepSpeed once, then forks
the ranks of each call.

    with Forks() as forks:
        forks.run(function, 8, argument)       # what rank 0 returned
        pids = forks.start(function, 2, argument)
        forks.line("loaded")  # waits for what rank 0 has said by say("loaded", 3): [3]
        forks.gone()                           # their exit statuses, once all have ended

A fork takes milliseconds where a new process takes seconds. Ranks that are killed hurt nobody else;
arguments and what is said are JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from hfscale.dist.world import Place, World, listen
from tests.helpers.ranks import ROOT, _address

PR_SET_PDEATHSIG = 1
HEARD = "HFSCALE_TEST_HEARD"  # environment variable: the descriptor that is listened to


def say(*words: Any) -> None:
    """Tell the one who started these ranks. Heard from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        os.write(int(os.environ[HEARD]), json.dumps(words).encode() + b"\n")


class Forks:
    """The process that forks, seen from the test. ``errors`` takes what the ranks print."""

    def __init__(self, errors: Path | None = None) -> None:
        heard, said = os.pipe()
        self.errors = errors.open("a") if errors else None
        env = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            HEARD: str(said),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forks"],
            cwd=ROOT,
            env=os.environ | env,
            text=True,
            pass_fds=[said],
            stdin=subprocess.PIPE,
            stdout=self.errors,
            stderr=self.errors,
        )
        os.close(said)
        self._heard = os.fdopen(heard)
        self.said: list[list[Any]] = []  # by the ranks of the last start

    def start(self, function: Callable[..., Any], world_size: int, *args: Any) -> list[int]:
        """Return the process ids of new ranks that call ``function(*args)``."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([_address(function), world_size, args]) + "\n")
        self.process.stdin.flush()
        self.said.clear()
        return self.line("ranks")

    def line(self, word: str) -> list[Any]:
        """Return what was said with ``word``; what comes before it is passed over."""
        for line in self._heard:
            first, *rest = heard = json.loads(line)
            self.said.append(heard)
            if first == word:
                return rest
            assert first != "gone", f"the ranks ended with {rest} before they said {word!r}"
        raise AssertionError("the process that forks is gone")

    def gone(self) -> list[int]:
        """Return the ranks' exit codes (negative: the signal) when all have ended."""
        return self.line("gone")

    def run(self, function: Callable[..., Any], world_size: int, *args: Any) -> Any:
        """Return what rank 0 returned."""
        self.start(function, world_size, *args)
        [answer] = self.line("returned")
        assert self.gone() == [0] * world_size
        return answer

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    """Import what ranks need, then fork for each line of stdin."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    from hfscale.dist import group
    from hfscale.run import live  # noqa: F401
    from tests.engine.tiny import tiny_model

    tiny_model()
    server = os.getpid()
    for line in sys.stdin:
        address, world_size, args = json.loads(line)
        module, _, name = address.partition(":")
        function = getattr(import_module(module), name)
        pids, listener = [], listen()
        port, handle = listener.getsockname()[1], listener.fileno()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != server:
                    os._exit(1)
                try:
                    if rank:
                        listener.close()
                    place = World(Place(rank, world_size), rank, world_size, "127.0.0.1", port)
                    group.start(place if rank else replace(place, listen_fd=handle))
                    say("returned", function(*args))
                    group.shutdown()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            pids.append(pid)
        listener.close()  # it is rank 0's
        say("ranks", *pids)
        say("gone", *(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))


if __name__ == "__main__":
    main()
