"""Which attempt may write into a run directory: the youngest. An older one that still lives finds
out, and leaves.

    RUN_DIR/attempts/N/            of the N-th attempt, made by `mkdir`: one alone gets a number, on
                                   any file system, without locks
    RUN_DIR/attempts/N/owner.json  who it is; touched once a second while it lives (the lease)
    RUN_DIR/attempts/N/exit_code   code and rank of the first rank that left by itself and not well
    RUN_DIR/attempts/N/left        when the script of its job ended (slurm/train.sbatch)
    RUN_DIR/attempts/N/ended       when and how it ended; of an attempt that was killed the next one
                                   writes it, from the last sign of life

Rank 0 asks before it commits a checkpoint and before it appends to the metrics, and a thread of it
asks once a second. No clock of another machine is ever compared with one of ours: a lease is alive
if it changes while one looks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from hfscale.errors import EXIT_HUNG, SupersededError, code_of
from hfscale.log import logger
from hfscale.monitor.beats import last_beat
from hfscale.records import Damaged, parse, read_file
from hfscale.run_files import ATTEMPTS, ENDED, EXIT_CODE, HANGS, LEFT, OWNER, REPORT

RENEW_S = 1.0
SETTLE_S = 0.2  # for an older attempt that has just looked, and is about to write
STALE_S = 60.0  # a heartbeat that is so much older than a lease is not of its attempt
WATCH_S = 5.0  # a lease that does not change for so long is nobody's


@dataclass(frozen=True)
class Owner:
    """Who an attempt is. ``job`` and ``restart`` are Slurm's."""

    host: str
    pid: int
    launcher: str = ""
    job: str = ""
    restart: int = 0
    started: str = ""
    nodes: str = ""  # of the job, as Slurm writes them; "": the host alone
    # seconds of the epoch; 0: not known
    at: float = 0.0  # as ``started``
    submitted: float = 0.0  # the job of Slurm; after a requeue, when that was
    job_began: float = 0.0  # when Slurm gave it its nodes

    def __str__(self) -> str:
        job = f", job {self.job} (restart {self.restart})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.started}"


@dataclass(frozen=True)
class End:
    """How an attempt ended. Where that is not known, ``time`` is of its last sign of life."""

    time: str
    code: int | None = None
    signal: str = ""  # that killed it: SIGKILL
    doing: str = ""  # of an attempt that was closed: what it was last seen at
    closed_by: int = 0  # the attempt that wrote this, as this one could not
    at: float = 0.0  # as ``time``, in seconds of the epoch; 0: not known

    def __str__(self) -> str:
        if not self.closed_by:
            return f"ended {self.time} with code {self.code}"
        at = f", in {self.doing}" if self.doing else ""
        known = "" if self.code is None else f", and a rank of it left with code {self.code}"
        seen = f"its last sign of life is of {self.time}{at}{known}"
        return f"left no end: it was killed, or its machine was lost; {seen}"


@dataclass(frozen=True)
class Fence:
    """The attempt ``number`` of a run."""

    run_dir: Path
    number: int

    @property
    def folder(self) -> Path:
        return self.run_dir / ATTEMPTS / str(self.number)

    def passed(self) -> bool:
        """Return whether a younger attempt has begun."""
        try:
            os.stat(self.run_dir / ATTEMPTS / str(self.number + 1))
        except FileNotFoundError:
            return False
        return True

    def check(self) -> None:
        """Return if this attempt may write.

        Raises:
            SupersededError: naming the attempt that took over.
        """
        if self.passed():
            raise SupersededError(self.superseded())

    def superseded(self) -> str:
        """Return who has taken over, in words."""
        younger = newest(self.run_dir)
        who = younger.owner() if younger else None
        return (
            f"attempt {self.number} of this run is superseded by attempt "
            f"{younger.number if younger else '?'} ({who or 'unknown'}), and leaves: {self.run_dir}"
        )

    def owner(self) -> Owner | None:
        """Return who this attempt is; None where nobody has written it down."""
        try:
            return parse(Owner, read_file(self.folder / OWNER, most=1 << 16))
        except (OSError, Damaged):
            return None

    def renew(self) -> None:
        """Say that this attempt lives."""
        with suppress(OSError):
            os.utime(self.folder / OWNER)
            # NFS: with the folder's new attributes the client forgets that N + 1 was not there
            os.utime(self.folder.parent)

    def alive(self, *, watch_s: float = WATCH_S) -> bool:
        """Return whether the attempt renews its lease: it is looked at until it has, at most for
        ``watch_s``.
        """
        if (self.folder / ENDED).exists():
            return False
        until = time.monotonic() + watch_s
        first = self._lease()
        while first is not None and time.monotonic() < until:
            time.sleep(0.1)
            if self._lease() != first:
                return not (self.folder / ENDED).exists()
        return False

    def _lease(self) -> int | None:
        """Return when the lease was renewed last, asked of the file system anew."""
        try:
            with open(self.folder / OWNER, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    def ending(self) -> End | None:
        """Return how the attempt ended; None if that is not written down."""
        file = self.folder / ENDED
        try:
            content = read_file(file, most=1 << 16)
            if content.strip().isdigit():  # version 0.1 wrote the code alone
                return End(_clock(file.stat().st_mtime), int(content))
            return parse(End, content)
        except (OSError, Damaged):
            return None

    def left_at(self) -> float:
        """Return when the attempt left its machines, in seconds of the epoch: the end of its job
        where slurm/train.sbatch has come to it, else as ``ending``; 0 if nobody knows.
        """
        end = self.ending()
        at = end.at if end else 0.0
        with suppress(OSError, ValueError):
            at = max(at, float(read_file(self.folder / LEFT, most=64)))
        return at

    def under_way(self) -> bool:
        """Return whether the attempt has not ended, as far as one can tell from here: of one that
        was killed with its launcher the launcher's own machine knows.
        """
        if self.ending() is not None:
            return False
        owner = self.owner()
        # its launcher lives as long as its ranks
        local = owner is not None and owner.launcher == "local"
        if owner is None or not local or owner.host != socket.gethostname():
            return True
        return os.path.exists(f"/proc/{owner.pid}")

    def ended(self) -> int | None:
        """Return the code with which the attempt has ended; None if it has not, or nobody knows."""
        end = self.ending()
        return end.code if end else None

    def end(self, code: int) -> None:
        """Write down that the attempt has ended."""
        with suppress(OSError):
            self._write(ENDED, End(_clock(), code, signal=_signal(code), at=time.time()))

    def close(self, *, by: int) -> End:
        """Return the end of an attempt that could not write it down, which attempt ``by`` now has:
        of one that was killed.
        """
        seen, doing = self.last_seen()
        told = self.told()
        code = told[0] if told else None
        if (self.run_dir / HANGS / str(self.number) / REPORT).is_file():
            code = EXIT_HUNG
        end = End(_clock(seen), code, _signal(code), doing, closed_by=by, at=seen)
        with suppress(OSError):
            self._write(ENDED, end)
        return end

    def last_seen(self) -> tuple[float, str]:
        """Return when the newest attempt gave its last sign of life, in seconds of the epoch, and
        what it was at ("": not known).
        """
        seen = (self._lease() or 0) / 1e9
        last = last_beat(self.run_dir)
        if last and last[0] > seen - STALE_S:  # else it is an older attempt's
            return max(seen, last[0]), f"{last[1].phase} of step {last[1].step}"
        return seen, ""

    def _write(self, name: str, content: Owner | End) -> None:
        """Write a file of the attempt, whole or not at all; others may write it at this moment."""
        new = self.folder / f".{name}.{socket.gethostname()}.{os.getpid()}"
        with open(new, "w") as file:
            file.write(json.dumps(asdict(content)))
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.folder / name)

    def tell(self, code: int, rank: int) -> None:
        """Write down why a rank leaves, if it is the first one."""
        with suppress(OSError), open(self.folder / EXIT_CODE, "x") as file:
            print(code, rank, file=file)

    def told(self) -> tuple[int, int] | None:
        """Return code and rank of the first rank that left by itself and not well; None if there is
        none.
        """
        try:
            code, rank = (self.folder / EXIT_CODE).read_text().split()
            return int(code), int(rank)
        except (OSError, ValueError):
            return None

    @contextmanager
    def kept(self, *, leave: bool = True) -> Iterator[None]:
        """Renew the lease inside; once superseded, ``leave`` with EXIT_HUNG, wherever this process
        is. An error that comes out ends the attempt.
        """
        over = threading.Event()
        thread = threading.Thread(target=self._keep, args=[over, leave], daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            self.end(code_of(error))
            raise
        finally:
            over.set()

    def _keep(self, over: threading.Event, leave: bool) -> None:
        while not over.is_set():
            self.renew()
            with suppress(OSError):  # a disk that does not answer: asked again, and by every commit
                if leave and self.passed():
                    logger.error(self.superseded())
                    self.end(EXIT_HUNG)
                    sys.stderr.flush()
                    os._exit(EXIT_HUNG)
            over.wait(RENEW_S)


def take(
    run_dir: Path,
    *,
    launcher: str = "",
    job: str = "",
    restart: int = 0,
    nodes: str = "",
    queued: tuple[float, float] = (0.0, 0.0),
) -> Fence:
    """Return the next attempt of a run, taken by this process. From now on every older one is
    superseded, and each has an end. ``queued``: when its job was submitted, and when it began.
    """
    owner = Owner(
        socket.gethostname(),
        os.getpid(),
        launcher,
        job,
        restart,
        _clock(),
        nodes,
        at=time.time(),
        submitted=queued[0],
        job_began=queued[1],
    )
    (run_dir / ATTEMPTS).mkdir(exist_ok=True)
    number = max([0, *_numbers(run_dir / ATTEMPTS), *_numbers(run_dir / HANGS)]) + 1
    while True:
        fence = Fence(run_dir, number)
        try:
            fence.folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        fence._write(OWNER, owner)
        open_ones = [old for old in attempts(run_dir) if old.number < number and not old.ending()]
        if open_ones:
            time.sleep(SETTLE_S)
        for old in open_ones:
            logger.info(f"attempt {old.number} of this run {old.ending() or old.close(by=number)}")
        return fence


def attempts(run_dir: Path) -> list[Fence]:
    """Return the attempts of a run, oldest first."""
    return [Fence(run_dir, number) for number in sorted(_numbers(run_dir / ATTEMPTS))]


def newest(run_dir: Path) -> Fence | None:
    """Return the newest attempt of a run; None if there is none, as in runs of older versions."""
    return [None, *attempts(run_dir)][-1]


def _clock(seconds: float | None = None) -> str:
    """Return a time of the epoch (None: now) as it is written down: local, to the second."""
    now = datetime.now() if seconds is None else datetime.fromtimestamp(seconds)
    return now.astimezone().isoformat(timespec="seconds")


def _signal(code: int | None) -> str:
    """Return the signal that an exit code of a shell, or of srun, stands for, if it is one."""
    numbers = {int(one) for one in signal.Signals}
    return signal.Signals(code - 128).name if code and code - 128 in numbers else ""


def _numbers(folder: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(folder) if name.isdecimal()]
    except FileNotFoundError:
        return []
