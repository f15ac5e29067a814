"""Signs of life of every rank, and the autopsy of a run that has none left.

    RUN_DIR/heartbeats/rank-N    what rank N does: one line, written over once a second
    RUN_DIR/hangs/N/             of the N-th attempt, which hung: every rank's stacks, NCCL's flight
                                 record, report.json

The training thread only remembers what it does (2 us); a thread beside it writes, so that a slow
disk costs no step.

All ranks pass through the same phases in the same order, so the one that has passed through fewest
is the one that the others wait for. A thread of each rank sees its own standstill: each writes down
its stacks, the lowest rank that can names the odd one out, and all leave the hard way, without a
collective. Time in which the whole process was stopped (`scontrol suspend`) is not counted.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from hfscale.errors import EXIT_HUNG
from hfscale.log import logger
from hfscale.monitor.beats import DATA, OWN, Beat, Slow, odd_ones, read_beats, slow_ranks
from hfscale.monitor.phases import PHASES
from hfscale.run_files import HANGS, HEARTBEATS, REPORT

LONG = ("start", "save", "rewind")  # may take LONG_S; so may the first step, which compiles
LONG_S = 1800.0
POLL_S = 1.0  # between looks
SETTLE_S = 20.0  # until all have written their stacks
AFTER_S = 3.0  # after the report
LAST_S = 55.0  # to leave, come what may
ROUND_S = 60.0  # how often rank 0 looks for slow ranks
WIDTH = 160  # bytes of a heartbeat


_current: Heartbeat | None = None


def beat(phase: str, step: int | None = None) -> None:
    """Say that this rank begins ``phase`` (of ``step``, counted from 1)."""
    PHASES.enter(phase)
    if _current is not None:
        _current.beat(phase, step)


def slow_lately() -> list[Slow]:
    """Return the slow ranks that were seen since the last call: on rank 0, about once a minute."""
    if _current is None:
        return []
    slow, _current.slow = _current.slow, []
    return slow


@contextmanager
def watching(
    run_dir: Path,
    *,
    rank: int,
    ranks: int,
    node: str,
    timeout_s: float | None,
    on_hang: Callable[[int], None],
    attempt: int = 0,
) -> Iterator[None]:
    """Watch this rank inside: where it stands still for ``timeout_s`` (None: for ever), the process
    ends with EXIT_HUNG.

    ``attempt`` is the number of the run's attempt; 0: a rank that was not told counts the ones that
    hung.

    ``on_hang`` is called before, on one rank, with the rank that is to blame, once the report is
    written.
    """
    global _current
    if timeout_s is None:
        yield
        return
    before = _current  # of a run around this one: a rehearsal's twin
    (run_dir / HANGS).mkdir(exist_ok=True)
    recorder = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{run_dir / HANGS}/nccl-timeout-rank-",
    }
    os.environ.update(recorder | os.environ)
    hung = [name for name in os.listdir(run_dir / HANGS) if name.isdigit()]
    _current = Heartbeat(
        run_dir,
        hang=run_dir / HANGS / str(attempt or len(hung) + 1),
        rank=rank,
        ranks=ranks,
        node=node,
        timeout_s=timeout_s,
        on_hang=on_hang,
    )
    try:
        yield
    finally:
        _current.close()
        _current = before


class Heartbeat:
    """One rank's heartbeat, the thread that writes it down, and the one that watches it: a slow
    disk holds the first alone.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        hang: Path,
        rank: int,
        ranks: int,
        node: str,
        timeout_s: float,
        on_hang: Callable[[int], None],
    ) -> None:
        self._run_dir, self._hang, self._on_hang = run_dir, hang, on_hang
        self._rank, self._ranks, self._timeout_s = rank, ranks, timeout_s
        (run_dir / HEARTBEATS).mkdir(exist_ok=True)
        file = run_dir / HEARTBEATS / f"rank-{rank}"
        self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._node, self._whose = node, f"{os.getpid()} {node}"
        self._count, self._step, self._phase = 0, 0, "start"
        self._own_s, self._data_s, self._since = 0.0, 0.0, time.monotonic()
        self.slow: list[Slow] = []  # that nobody has asked for yet
        self._first: int | None = None  # step of this attempt
        self.beat("start", None)
        self._write_down()
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"heartbeat-{work.__name__}", daemon=True)
            for work in (self._write, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def beat(self, phase: str, step: int | None) -> None:
        """Remember the phase that begins."""
        now = time.monotonic()
        if self._phase in OWN:
            self._own_s += now - self._since
        if self._phase == DATA:
            self._data_s += now - self._since
        if step is not None:
            self._step = step
            self._first = self._first or step
        self._count, self._phase, self._since = self._count + 1, phase, now
        # at once: others read it
        self._now = (self._count, self._step, phase, self._own_s, self._data_s)

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(POLL_S)  # a disk that does not answer may hold it
        faulthandler.cancel_dump_traceback_later()
        if not self._threads[0].is_alive():
            os.close(self._fd)

    def _write(self) -> None:
        while True:
            self._write_down()
            if self._over.wait(POLL_S):
                return self._write_down()

    def _write_down(self) -> None:
        count, step, phase, own_s, data_s = self._now
        line = f"{count} {step} {phase} {own_s:.3f} {self._whose} {data_s:.3f}\n"
        with suppress(OSError):  # training goes on without
            os.pwrite(self._fd, line.ljust(WIDTH).encode(), 0)

    def limit_s(self) -> float:
        """Return how long the present phase may last."""
        long = self._phase in LONG or self._first in (None, self._step)
        return max(self._timeout_s, LONG_S) if long else self._timeout_s

    def _watch(self) -> None:
        seen, idle_s, earlier, looked = -1, 0.0, list[Beat](), time.monotonic()
        while not self._over.wait(POLL_S):
            seen, idle_s = self._count, idle_s + POLL_S if self._count == seen else 0.0
            limit_s = self.limit_s()
            # another one has stood for longer
            if idle_s >= limit_s or (idle_s >= self._timeout_s / 2 and os.path.exists(self._hang)):
                self._autopsy(idle_s)
            # if this thread is never let run again
            faulthandler.dump_traceback_later(limit_s, file=2)
            if self._rank == 0 and time.monotonic() - looked > min(ROUND_S, self._timeout_s):
                beats = read_beats(self._run_dir, range(self._ranks))
                self.slow += slow_ranks(earlier, beats)
                earlier, looked = beats, time.monotonic()

    # -------------------------------------------------------------------------------------- autopsy
    def _autopsy(self, idle_s: float) -> NoReturn:
        """Write this rank's stacks; with the others' find who is to blame; end the process."""
        last = threading.Timer(LAST_S, os._exit, [EXIT_HUNG])  # also where the disk does not answer
        last.daemon = True
        last.start()
        faulthandler.cancel_dump_traceback_later()
        try:
            self._write_down()
            self._hang.mkdir(exist_ok=True)
            with open(self._stacks(self._rank), "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            self._dump_nccl()
            until = time.monotonic() + min(SETTLE_S, self._timeout_s)
            while (silent := self._silent()) and time.monotonic() < until:
                time.sleep(POLL_S)
            self._look_from_outside(read_beats(self._run_dir, silent))
            if self._rank == min(set(range(self._ranks)) - set(silent)):
                self._judge(idle_s, silent)
            else:
                while not (self._hang / REPORT).exists():
                    time.sleep(0.5)
                # not before the judge: the first to leave may have the others killed
                time.sleep(AFTER_S)
        except OSError as error:
            logger.error(
                f"no progress for {idle_s:.0f} s, and the stacks cannot be written: {error}"
            )
        finally:
            sys.stderr.flush()
            os._exit(EXIT_HUNG)

    def _stacks(self, rank: int) -> Path:
        return self._hang / f"rank-{rank}.txt"

    def _silent(self) -> list[int]:
        """Return the ranks that have not written their stacks."""
        written = set(os.listdir(self._hang))
        return [rank for rank in range(self._ranks) if self._stacks(rank).name not in written]

    def _dump_nccl(self) -> None:
        torch = sys.modules.get("torch")
        dump = (
            torch
            and torch.cuda.is_initialized()
            and getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        )
        if dump:
            (self._hang / f"nccl-rank-{self._rank}.json").write_bytes(dump())

    def _look_from_outside(self, silent: Sequence[Beat]) -> None:
        """Let py-spy, if it is there, write the stacks of ranks of this node that cannot do so:
        stopped, or inside of C code.
        """
        py_spy = shutil.which("py-spy")
        for there in [beat for beat in silent if py_spy and beat.node == self._node]:
            with (
                suppress(OSError, subprocess.TimeoutExpired),
                open(self._hang / f"rank-{there.rank}-py-spy.txt", "x") as file,
            ):
                subprocess.run(
                    [str(py_spy), "dump", "--nonblocking", "--pid", str(there.pid)],
                    stdout=file,
                    stderr=file,
                    timeout=SETTLE_S,
                )

    def _judge(self, idle_s: float, silent: Sequence[int]) -> None:
        beats = read_beats(self._run_dir, range(self._ranks))
        waiting = [
            rank
            for rank in range(self._ranks)
            if rank not in silent and _waits(self._stacks(rank).read_text())
        ]
        odd = odd_ones(beats, silent=silent, waiting=waiting)
        others = Counter(f"{beat.phase} of step {beat.step}" for beat in beats if beat not in odd)
        named = [
            f"rank {beat.rank} on {beat.node} stands in {beat.phase} of step {beat.step}"
            + " and does not answer" * (beat.rank in silent)
            for beat in odd
        ]
        text = (
            "; ".join(named) if odd else "no rank differs from the others: the network, or a disk"
        )
        logger.error(
            f"no progress for {idle_s:.0f} s: {text}; the others: "
            f"{', '.join(f'{n} in {where}' for where, n in others.items())}. "
            f"Stacks: {self._hang}"
        )
        content = {
            "idle_s": idle_s,
            "verdict": text,
            "odd": [asdict(beat) for beat in odd],
            "beats": [asdict(beat) for beat in beats],
        }
        (self._hang / f"{REPORT}.new").write_text(json.dumps(content, indent=1))
        # the sign for the others to leave
        (self._hang / f"{REPORT}.new").rename(self._hang / REPORT)
        self._on_hang(odd[0].rank if odd else self._rank)


def _waits(stacks: str) -> bool:
    """Return whether the main thread, the last one in faulthandler's words, is inside a
    collective.
    """
    return "torch/distributed/" in stacks.rpartition("hread 0x")[2]
