"""Which attempt may write into a run directory: the youngest. An older one that still lives finds
out, and leaves.

    RUN_DIR/attempts/N/            of the N-th attempt, made by `mkdir`: one alone gets a number, on
                                   any file system, without locks
    RUN_DIR/attempts/N/owner.json  who it is; touched once a second while it lives (the lease)
    RUN_DIR/attempts/N/exit_code   code and rank of the first rank that left by itself and not well
    RUN_DIR/attempts/N/ended       the exit code, once rank 0 has left in order

Rank 0 asks before it commits a checkpoint and before it appends to the metrics, and a thread of it
asks once a second. No clock of another machine is ever compared with one of ours: a lease is alive
if it changes while one looks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from hfscale.errors import EXIT_HUNG, SupersededError
from hfscale.log import logger
from hfscale.records import Damaged, parse, read_file
from hfscale.run_files import ATTEMPTS, ENDED, EXIT_CODE, HANGS, OWNER

RENEW_S = 1.0
SETTLE_S = 0.2  # for an older attempt that has just looked, and is about to write
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

    def __str__(self) -> str:
        job = f", job {self.job} (restart {self.restart})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.started}"


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

    def ended(self) -> int | None:
        """Return the code with which the attempt has ended in order; None if it has not."""
        try:
            return int((self.folder / ENDED).read_text())
        except (OSError, ValueError):
            return None

    def end(self, code: int) -> None:
        """Write down that the attempt has ended."""
        with suppress(OSError):
            (self.folder / ENDED).write_text(f"{code}\n")

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
        is.
        """
        over = threading.Event()
        thread = threading.Thread(target=self._keep, args=[over, leave], daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()

    def _keep(self, over: threading.Event, leave: bool) -> None:
        while not over.is_set():
            self.renew()
            with suppress(OSError):  # a disk that does not answer: asked again, and by every commit
                if leave and self.passed():
                    logger.error(self.superseded())
                    sys.stderr.flush()
                    os._exit(EXIT_HUNG)
            over.wait(RENEW_S)


def take(run_dir: Path, *, launcher: str = "", job: str = "", restart: int = 0) -> Fence:
    """Return the next attempt of a run, taken by this process. From now on every older one is
    superseded.
    """
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    owner = Owner(socket.gethostname(), os.getpid(), launcher, job, restart, started)
    (run_dir / ATTEMPTS).mkdir(exist_ok=True)
    number = max([0, *_numbers(run_dir / ATTEMPTS), *_numbers(run_dir / HANGS)]) + 1
    while True:
        fence = Fence(run_dir, number)
        try:
            fence.folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        new = fence.folder / f".{OWNER}"
        new.write_text(json.dumps(asdict(owner)))
        new.rename(fence.folder / OWNER)
        if number > 1 and Fence(run_dir, number - 1).ended() is None:
            time.sleep(SETTLE_S)
        return fence


def newest(run_dir: Path) -> Fence | None:
    """Return the newest attempt of a run; None if there is none, as in runs of older versions."""
    numbers = _numbers(run_dir / ATTEMPTS)
    return Fence(run_dir, max(numbers)) if numbers else None


def _numbers(folder: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(folder) if name.isdecimal()]
    except FileNotFoundError:
        return []
