"""Where the hours of a run went: every second from its first submission, over all its attempts.

Each attempt leaves its beginning and its end (``monitor/fence.py``) and marks of what it has done
so far (``training/observers/goodput.py``). Between them lie the queue, the starts, and work that a
later attempt, which began from an older checkpoint, had to do again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from pydantic import FiniteFloat

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.errors import EXIT_DONE, EXIT_HUNG, EXIT_STOPPED, CheckpointError
from hfscale.monitor.fence import Fence, attempts
from hfscale.monitor.lines import read_lines
from hfscale.monitor.phases import START
from hfscale.records import Count, Damaged, Record, parse, read_file
from hfscale.run.environment import entries

QUEUE, BETWEEN, LAUNCH = "queue", "between attempts", "launch"
START_UP, COMPUTE, LOST = "start-up", "compute", "lost work"
STALL = "data stall"  # of steps but the first
HANG, SHUTDOWN = "hang", "shutdown"
ENDED_WELL = (EXIT_DONE, EXIT_STOPPED)  # all that was done is saved
UNMARKED = "not marked yet"  # of an attempt under way
# a phase of a step -> the part of the run's time that it is of
PARTS = {
    "forward": COMPUTE,
    "backward": COMPUTE,
    "step": COMPUTE,
    "data": STALL,
    "collective": "communication wait",
    "save": "save stall",
    "validation": "evaluation",
    "observe": "logging",
    "shutdown": SHUTDOWN,
    "rewind": LOST,  # the way back to a checkpoint, and the search for what was to blame
}
MEANS = {
    QUEUE: "the job waited for nodes",
    BETWEEN: "nobody had started the run again",
    START_UP: "from the launcher's start to the end of the first step's delay",
    COMPUTE: "forward, backward, optimizer, of steps that stayed",
    STALL: "training waited for rows",
    "communication wait": "this rank waited for the others before a step",
    "save stall": "training waited for a save",
    "evaluation": "validations",
    "logging": "what watches the run",
    LOST: "steps behind the checkpoint from which the run goes on: done again, or to be",
    HANG: "from the last progress until the hang was found",
    SHUTDOWN: "from the last step's end to the end of the attempt",
    UNMARKED: "since the newest mark of an attempt under way",
}


class Mark(Record):
    """A line of ``goodput.jsonl``: what the process of rank 0 had done by ``time``."""

    attempt: Count
    step: Count
    began: FiniteFloat  # of the process, in seconds of the epoch
    time: FiniteFloat
    phases: dict[str, FiniteFloat]  # seconds since ``began``


Seconds = dict[str, float]


@dataclass
class Piece:
    """What lies between two marks of an attempt, but for the start-up."""

    steps: tuple[int, int]  # that were done at the marks
    parts: Seconds


@dataclass
class Spent:
    """The seconds of one attempt, with the wait before it."""

    number: int
    began: FiniteFloat  # of this record: where the one before ended, in seconds of the epoch
    at: float  # of the attempt
    ended: float
    code: int | None = None  # None: under way, or nobody knows
    start: Seconds = field(default_factory=dict)  # of the start-up, by its parts
    pieces: list[Piece] = field(default_factory=list)
    around: Seconds = field(default_factory=dict)  # before and after the marks, by parts

    @property
    def steps(self) -> tuple[int, int]:
        """The step that it began from, and how far it came."""
        steps = [step for piece in self.pieces for step in piece.steps]
        return (steps[0], max(steps)) if steps else (0, 0)

    def parts(self) -> Seconds:
        """Return the seconds by part."""
        total = dict(self.around)
        for piece in self.pieces:
            add(total, piece.parts)
        add(total, {START_UP: sum(self.start.values())})
        return total


def add(total: Seconds, more: Mapping[str, float]) -> None:
    """Add the seconds of ``more`` to those of ``total``, part by part."""
    for name, seconds in more.items():
        total[name] = total.get(name, 0.0) + seconds


@dataclass(frozen=True)
class Ledger:
    """The time of a run, in order of its attempts."""

    run_dir: Path
    attempts: Sequence[Spent]

    @property
    def began(self) -> float:
        """When the run was submitted first, in seconds of the epoch."""
        return self.attempts[0].began

    @property
    def seconds(self) -> float:
        """From then to the end of the newest attempt, or until now."""
        return self.attempts[-1].ended - self.began

    def parts(self) -> Seconds:
        """Return the seconds by part, in the order of ``MEANS``; they sum to ``seconds``."""
        total: Seconds = {}
        for one in self.attempts:
            add(total, one.parts())
        return {name: total[name] for name in MEANS if total.get(name)}

    def start(self) -> Seconds:
        """Return the seconds of all starts by their parts."""
        total: Seconds = {}
        for one in self.attempts:
            add(total, one.start)
        return total

    def goodput(self, *, held: bool = False) -> float:
        """Return which share of the time went into steps that stayed; of the time in which nodes
        were ``held``, without queue and pauses, if that is asked.
        """
        parts = self.parts()
        whole = self.seconds
        if held:
            whole -= parts.get(QUEUE, 0.0) + parts.get(BETWEEN, 0.0)
        return parts.get(COMPUTE, 0.0) / whole if whole > 0 else 0.0

    def as_dict(self) -> dict[str, object]:
        """Return it for scripts: seconds, shares, and each attempt."""
        return {
            "run_dir": str(self.run_dir),
            "began": self.began,
            "seconds": self.seconds,
            "goodput": self.goodput(),
            "goodput_held": self.goodput(held=True),
            "parts": self.parts(),
            "start": self.start(),
            "attempts": [
                {
                    "attempt": one.number,
                    "began": one.at,
                    "ended": one.ended,
                    "code": one.code,
                    "steps": list(one.steps),
                    "start": one.start,
                    "parts": one.parts(),
                }
                for one in self.attempts
            ],
        }


def ledger(run_dir: Path, *, now: float | None = None) -> Ledger:
    """Return where the time of a run went until its end, or until ``now`` (seconds of the epoch).

    Raises:
        CheckpointError: if the run has not begun, or is of a version that kept no times.
        DataError: if a mark is damaged.
    """
    tries = attempts(run_dir)
    owners = [one.owner() for one in tries]
    if not any(owner and owner.at for owner in owners):
        raise CheckpointError(
            "nothing here says when this run began",
            where=run_dir,
            remedy="runs of version 0.1 kept no times; its next attempt does",
        )
    marks = list(read_lines(run_dir / run_files.GOODPUT, Mark))
    logged = run_dir / run_files.METRICS
    if not marks and logged.is_file() and logged.stat().st_size:
        raise CheckpointError(
            "this run has trained, and nothing says what it did when",
            where=run_dir / run_files.GOODPUT,
            remedy="restore the file; the run itself does not need it",
        )
    spent: list[Spent] = []
    for one, owner in zip(tries, owners, strict=True):
        if owner is None or not owner.at:
            continue
        since = spent[-1].ended if spent else first_submission(run_dir, one)
        own = [mark for mark in marks if mark.attempt == one.number]
        spent.append(_spent(one, own, since, first=not spent))
    under_way = tries[-1].under_way()
    if under_way:
        seen = max(time.time() if now is None else now, spent[-1].ended)
        add(spent[-1].around, {UNMARKED: seen - spent[-1].ended})
        spent[-1].ended = seen
    _move_lost(run_dir, spent, saved=under_way or spent[-1].code in ENDED_WELL)
    return Ledger(run_dir, spent)


def first_submission(run_dir: Path, first: Fence) -> float:
    """Return when a run was submitted, in seconds of the epoch: as its first entry of the record
    says, or its job, whichever was earlier.
    """
    owner = first.owner()
    assert owner is not None, "an attempt with an owner"
    moments = [owner.at]
    if owner.submitted:
        moments.append(owner.submitted)
    with suppress(CheckpointError, ValueError):  # then the attempt tells enough
        started = [entry.started for entry in entries(run_dir)[:1]]
        moments += [datetime.fromisoformat(moment).timestamp() for moment in started]
    return min(moments)


def _spent(attempt: Fence, marks: Sequence[Mark], since: float, *, first: bool) -> Spent:
    """Return the time from ``since`` to the end of an attempt, or to its newest mark."""
    owner, end = attempt.owner(), attempt.ending()
    assert owner is not None, "an attempt with an owner"
    begins = max(owner.at, since)
    ends = attempt.left_at() if end else 0.0
    if not end and not attempt.under_way():  # killed with its launcher; nobody has said so yet
        ends = attempt.last_seen()[0]
    ends = ends or (marks[-1].time if marks else begins)
    code = end.code if end else None
    spent = Spent(attempt.number, since, begins, max(ends, begins), code=code)
    granted = min(max(owner.job_began, since), begins) if owner.job else begins
    if owner.job:
        spent.around = {QUEUE: granted - since}
        spent.start = {"job script": begins - granted}
    elif first:
        spent.start = {LAUNCH: begins - since}
    else:
        spent.around = {BETWEEN: begins - since}
    if not marks:
        spent.start["never done"] = spent.ended - begins
        return spent
    add(spent.start, {LAUNCH: max(0.0, marks[0].began - begins)})
    for before, after in pairwise([None, *marks]):
        assert after is not None, "only the first has none before it"
        add(spent.start, {name.removeprefix(START): s for name, s in _starting(before, after)})
        step = before.step if before else after.step
        spent.pieces.append(Piece((step, after.step), _working(before, after)))
    _move_first_step(spent)
    if not attempt.under_way():
        after_s = max(0.0, spent.ended - marks[-1].time)
        hung_s = min(hang_s(attempt), after_s) if spent.code == EXIT_HUNG else 0.0
        left = SHUTDOWN if spent.code in ENDED_WELL else LOST
        add(spent.around, {HANG: hung_s, left: after_s - hung_s})
    return spent


def _between(before: Mark | None, after: Mark) -> Iterator[tuple[str, float]]:
    """Yield the seconds by phase between two marks of one process."""
    earlier = before.phases if before else {}
    for phase, seconds in after.phases.items():
        yield phase, seconds - earlier.get(phase, 0.0)


def _starting(before: Mark | None, after: Mark) -> Iterator[tuple[str, float]]:
    """Yield those of the start-up."""
    yield from ((name, s) for name, s in _between(before, after) if name.startswith(START))


def _working(before: Mark | None, after: Mark) -> Seconds:
    """Return the others by part."""
    parts: Seconds = {}
    for phase, seconds in _between(before, after):
        if not phase.startswith(START):
            add(parts, {PARTS.get(phase, COMPUTE): seconds})
    return parts


def _move_first_step(spent: Spent) -> None:
    """Count as start-up what the first step took longer than the others: the first batch, compiled
    kernels, first allocations.
    """
    if len(spent.pieces) < 2:
        return
    first, later = spent.pieces[1], spent.pieces[2:]
    spent.start["first batch"] = first.parts.pop(STALL, 0.0)
    steps = spent.pieces[-1].steps[1] - first.steps[1]
    if steps < 1:
        return
    usual_s = sum(piece.parts.get(COMPUTE, 0.0) for piece in later) / steps
    excess_s = max(0.0, first.parts.get(COMPUTE, 0.0) - usual_s)
    spent.start["first step"] = excess_s
    add(first.parts, {COMPUTE: -excess_s})


def hang_s(attempt: Fence) -> float:
    """Return how long a hung attempt had stood still when it ended; 0 if nobody reported it."""
    file = attempt.run_dir / run_files.HANGS / str(attempt.number) / run_files.REPORT
    try:
        report = parse(_Hang, read_file(file))
        reported = file.stat().st_mtime
    except (OSError, Damaged):
        return 0.0
    end = attempt.ending()
    return report.idle_s + max(0.0, end.at - reported if end else 0.0)


class _Hang(Record):
    idle_s: float


def _move_lost(run_dir: Path, spent: Sequence[Spent], *, saved: bool) -> None:
    """Move what was done after the step from which the run went on to the lost work; of the newest
    attempt, whose end may be ``saved``, what was done after the newest checkpoint.
    """
    folders = layout.committed(run_dir / run_files.CHECKPOINTS)
    stretches = list(_stretches(spent))
    for place, stretch in enumerate(stretches):
        if place + 1 < len(stretches):
            kept = stretches[place + 1][0].steps[0]
        elif saved:
            return
        else:
            kept = layout.step_of(folders[-1]) if folders else 0
        for piece in stretch:
            share = _share_after(kept, *piece.steps)
            stays = {name: seconds * (1 - share) for name, seconds in piece.parts.items()}
            lost_s = sum(piece.parts.values()) - sum(stays.values())
            piece.parts = {**stays, LOST: lost_s} if share else piece.parts


def _stretches(spent: Sequence[Spent]) -> Iterator[list[Piece]]:
    """Yield the pieces in stretches in which the step only grows: of an attempt, or of what it did
    before and after it went back.
    """
    for one in spent:
        stretch: list[Piece] = []
        for piece in one.pieces:
            if piece.steps[1] < piece.steps[0]:
                yield stretch
                stretch = []
                piece.steps = piece.steps[1], piece.steps[1]
            stretch.append(piece)
        if stretch:
            yield stretch


def _share_after(kept: int, before: int, after: int) -> float:
    """Return which share of the steps from ``before`` to ``after`` lies behind step ``kept``."""
    if after <= kept:
        return 0.0
    return (after - max(kept, before)) / max(1, after - before)
