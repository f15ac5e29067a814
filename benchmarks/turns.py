"""Training jobs that take turns: all are alive, one runs while the others are stopped (SIGSTOP),
for a few seconds each.

So candidates are compared within seconds of each other, without starting again, by the wall clock
of this process: it stamps the lines "step N/M  loss X" that a job prints. The steps around a change
of turns are not counted.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

STEP = re.compile(r"\bstep +(\d+)/\d+ +loss +([\d.]+)")
PATIENCE_S = 600.0  # for one line, the start of the program included


@dataclass(frozen=True)
class Line:
    """A logged step, when it was seen (perf_counter), and its loss."""

    seen_s: float
    step: int
    loss: float


@dataclass(frozen=True)
class Turn:
    """What one turn measured."""

    step_s: float  # wall clock
    step_cpu_s: float  # processor time of all processes of the job


class Job:
    """A training command and every process it starts."""

    def __init__(self, name: str, command: Sequence[str], *, env: Mapping[str, str]) -> None:
        self.name = name
        self.losses: dict[int, float] = {}
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._tail: deque[str] = deque(maxlen=40)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if found := STEP.search(text):
                self._lines.put(Line(time.perf_counter(), int(found[1]), float(found[2])))
            else:
                self._tail.append(text)
        self._lines.put(None)

    def wait(self) -> Line:
        """Return the next logged step.

        Raises:
            RuntimeError: with the job's last words, if it ended.
        """
        with suppress(queue.Empty):
            if line := self._lines.get(timeout=PATIENCE_S):
                self.losses[line.step] = line.loss
                return line
        raise RuntimeError(
            f"{self.name} has ended, or said nothing for {PATIENCE_S:g} s:\n{''.join(self._tail)}"
        )

    def turn(self, *, lines: int) -> Turn:
        """Return the time of a step over ``lines`` logged steps, while no other job runs."""
        self._signal("resume")
        while not self._lines.empty():
            self.wait()
        first, cpu_s = self.wait(), self._cpu_s()
        for _ in range(lines):
            last = self.wait()
        cpu_s = self._cpu_s() - cpu_s
        self.pause()
        steps = last.step - first.step
        return Turn((last.seen_s - first.seen_s) / steps, cpu_s / steps)

    def warm_up(self, *, lines: int) -> None:
        """Return when the job has started and logged ``lines`` steps, paused."""
        for _ in range(lines):
            self.wait()
        self.pause()

    def pause(self) -> None:
        """Stop every process of the job where it is."""
        self._signal("suspend")

    def kill(self) -> None:
        """End every process of the job."""
        self._signal("kill")
        self._process.wait()

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, verb: str) -> None:
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                getattr(process, verb)()

    def _cpu_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())


def end_with_jobs() -> None:
    """Make SIGTERM an exception, so that ``finally`` ends the jobs: a stopped process would stay
    for ever.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def take_turns(jobs: Sequence[Job], *, turns: int, lines: int) -> dict[str, list[Turn]]:
    """Return each job's turns; each round starts with another job. The jobs must be paused."""
    taken: dict[str, list[Turn]] = {job.name: [] for job in jobs}
    for number in range(turns):
        shift = number % len(jobs)
        for job in [*jobs[shift:], *jobs[:shift]]:
            taken[job.name].append(job.turn(lines=lines))
    return taken
