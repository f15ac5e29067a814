"""Where a run is, from what it has written: step, loss, speed, expected end, last checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.config.schema import TrainConfig
from hfscale.errors import (
    EXIT_DONE,
    EXIT_HUNG,
    EXIT_STOPPED,
    EXIT_UNHEALTHY,
    EXIT_USER_ERROR,
    UserError,
)
from hfscale.monitor.beats import OWN, last_beat, read_beats
from hfscale.monitor.clock import duration
from hfscale.monitor.fence import End, Fence, attempts
from hfscale.monitor.incidents import incidents
from hfscale.monitor.lines import read_lines
from hfscale.monitor.metrics_log import Logged
from hfscale.records import Count, Record
from hfscale.reports.goodput import COMPUTE, ledger

TAIL_BYTES = 65536
LAST = 5  # attempts that are shown
LEAST_TIMES = 10  # logged steps, from which on the expected end has a spread
ENDS: dict[int | None, str] = {
    EXIT_DONE: "done",
    EXIT_USER_ERROR: "refused",
    EXIT_STOPPED: "stopped and saved",
    EXIT_UNHEALTHY: "unhealthy numbers",
    EXIT_HUNG: "hung, lost, or superseded",
}


class Metrics(Record):
    """A line of ``metrics.jsonl``; its figures are numbers or, where they are not finite, null."""

    step: Count
    attempt: Count = 0
    loss: float | None = None
    tokens_seen: Count = 0
    tokens_per_s: float = 0.0
    step_s: float = 0.0
    data_wait_s: float = 0.0
    epoch: float | None = None


def records(run_dir: Path, *, last_bytes: int | None = None) -> Iterator[Logged]:
    """Yield the records of a run's metrics in the order in which they were logged, but for what a
    kill has torn; none if there is no run.

    With ``last_bytes`` only those that lie in them as a whole.
    """
    for record in read_lines(run_dir / run_files.METRICS, Metrics, last_bytes=last_bytes):
        yield record.as_dict()


def last_record(run_dir: Path) -> Logged:
    """Return the newest whole record of a run's metrics; empty if there is none."""
    return [{}, *records(run_dir, last_bytes=TAIL_BYTES)][-1]


def progress(config: TrainConfig, record: Logged) -> float:
    """Return which part of the run is done, in [0, 1]."""
    train = config.train
    done = (
        (record["step"], train.steps),
        (record["tokens_seen"], train.tokens),
        (record.get("epoch"), train.epochs),
    )
    return min(1.0, next((have / whole for have, whole in done if have is not None and whole), 0.0))


def steps_left(config: TrainConfig, record: Logged) -> float:
    """Return how many steps of the present batch are left.

    Of a run of epochs, as if it had always had that batch: a record does not tell the rows of an
    epoch.
    """
    train, part = config.train, progress(config, record)
    if train.steps is not None:
        return max(0, train.steps - int(record["step"]))
    if train.tokens is not None:
        rows = (train.tokens - record["tokens_seen"]) / config.data.seq_len
        return float(max(0.0, rows / train.global_batch))
    return int(record["step"]) * (1 - part) / part if part else 0.0


@dataclass(frozen=True)
class Line:
    """Something about a run: for people, and the same for scripts."""

    name: str
    words: str
    value: object = None  # as JSON has it; None: nothing that another line has not


def describe(config: TrainConfig, *, now: float | None = None, running: bool = True) -> list[Line]:
    """Return what there is to say of a run; ``now`` is in seconds of the epoch. One that is not
    ``running`` has no expected end.
    """
    now = time.time() if now is None else now
    run = config.run_dir
    record, tries = last_record(run), attempts(run)
    lines = [Line("run", str(run), str(run))]
    if record:
        lines += _progress(config, record, now=now)
        lines.append(_end(config, record, tries, now=now if running else None))
    else:
        lines.append(Line("step", "none was logged yet"))
    lines.append(_last_checkpoint(run, now=now))
    lines += [*_last_incident(run, now=now), *_goodput(run, now=now)]
    if running:
        lines += [line for line in (_starting(tries, now=now), slowest_rank(run)) if line]
    # runs of 0.1 have them in the record alone
    count = max([record.get("attempt", 0), *(one.number for one in tries)])
    lines.append(Line("attempts", str(count), [_attempt_of(one) for one in tries]))
    lines += [Line(f"attempt {one.number}", _attempt(one)) for one in tries[-LAST:]]
    return lines


def _starting(tries: Sequence[Fence], *, now: float) -> Line | None:
    """Return that the newest attempt is on its way to its first step; None if it is not."""
    owner, last = (tries[-1].owner(), last_beat(tries[-1].run_dir)) if tries else (None, None)
    if owner is None or not owner.at or (last and last[1].step):
        return None
    since_s = now - owner.at
    return Line("now", f"starting, for {_time(since_s)}", {"starting_for_s": since_s})


def _progress(config: TrainConfig, record: Logged, *, now: float) -> list[Line]:
    """Return the lines on step, loss and speed."""
    part = progress(config, record)
    quiet_s = now - os.stat(config.run_dir / run_files.METRICS).st_mtime
    step = f"{record['step']:,} ({part:.1%}), logged {_time(quiet_s)} ago"
    waiting = record["data_wait_s"] / max(record["step_s"], 1e-9)
    speed = (
        f"{record['tokens_per_s']:,.0f} tokens/s, {record['step_s']:.3g} s a step, "
        f"{waiting:.0%} of it waiting for data"
    )
    loss = record.get("loss")
    return [
        Line("step", step, {"step": record["step"], "part": part, "logged_s_ago": quiet_s}),
        Line("loss", "not finite" if loss is None else f"{loss:.4f}", loss),
        Line(
            "speed",
            speed,
            {name: record[name] for name in ("tokens_per_s", "step_s", "data_wait_s")},
        ),
    ]


def _end(config: TrainConfig, record: Logged, tries: Sequence[Fence], *, now: float | None) -> Line:
    """Return when the run is expected to end, by the steps of late: the median of their times, and
    a tenth of them from either end. ``now`` is None where nothing runs.
    """
    name = "expected end"
    if progress(config, record) == 1.0 or _is_done(tries):
        return Line(name, "done", {"done": True})
    steps = steps_left(config, record)
    times = sorted(
        one["step_s"] for one in records(config.run_dir, last_bytes=TAIL_BYTES) if "step_s" in one
    )
    tenth = len(times) // 10
    left_s, least_s, most_s = (
        steps * step_s for step_s in (median(times), times[tenth], times[-1 - tenth])
    )
    left = f"{_time(left_s)} of training left"
    value: dict[str, object] = {
        "done": False,
        "left_s": left_s,
        "left_s_between": [least_s, most_s],
    }
    if now is None:
        return Line(name, f"not while it does not run ({left})", value)
    value["at"] = now + left_s
    between = ""
    if len(times) >= LEAST_TIMES:
        between = f", between {_clock(now + least_s)} and {_clock(now + most_s)}"
    return Line(name, f"{_clock(now + left_s)} ({left}{between})", value)


def _last_checkpoint(run: Path, *, now: float) -> Line:
    saved = layout.committed(run / run_files.CHECKPOINTS)
    if not saved:
        return Line("last checkpoint", "none")
    step = layout.step_of(saved[-1])
    age_s = now - os.stat(saved[-1] / layout.MANIFEST).st_mtime
    words = f"step {step:,}, {_time(age_s)} ago"
    return Line("last checkpoint", words, {"step": step, "age_s": age_s})


def _last_incident(run: Path, *, now: float) -> Iterator[Line]:
    """Yield what was wrong with the run last, and what was done; nothing of a run that was always
    healthy.
    """
    try:
        every = incidents(run)
    except UserError as error:  # one line less of many
        yield Line("last incident", f"not known: {error.what}")
        return
    if not every:
        return
    last = every[-1]
    words = (
        f"{last.kind} in step {last.step:,}: {last.decision}, {_time(now - last.time)} ago; "
        f"{len(every)} in all (hfscale incident)"
    )
    value = {
        "step": last.step,
        "kind": last.kind,
        "decision": last.decision,
        "age_s": now - last.time,
        "count": len(every),
    }
    yield Line("last incident", words, value)


def _goodput(run: Path, *, now: float) -> Iterator[Line]:
    """Yield which share of the run's time went into steps that stayed, and what took most of the
    rest; nothing of a run that kept no times.
    """
    if not (run / run_files.GOODPUT).is_file():
        return
    try:
        times = ledger(run, now=now)
    except UserError as error:  # one line less of many
        yield Line("goodput", f"not known: {error.what}")
        return
    rest = {name: s for name, s in times.parts().items() if name != COMPUTE}
    most = max(rest, key=lambda name: rest[name], default="")
    words = f"{times.goodput():.1%} of {duration(times.seconds)}"
    if most:
        words += f"; most of the rest is {most}, {duration(rest[most])}"
    yield Line(
        "goodput",
        words,
        {"goodput": times.goodput(), "seconds": times.seconds, "parts": times.parts()},
    )


def slowest_rank(run: Path) -> Line | None:
    """Return the rank that needs most time for what it does by itself, since its start; None of a
    run of one rank, or of one that leaves no signs of life.
    """
    folder = run / run_files.HEARTBEATS
    names = [file.name.removeprefix("rank-") for file in folder.glob("rank-*")]
    beats = read_beats(run, sorted(int(name) for name in names if name.isdecimal()))
    if len(beats) < 2 or max(beat.step for beat in beats) == 0:
        return None
    slowest = max(beats, key=lambda beat: beat.own_s)
    usual_s = median(beat.own_s for beat in beats if beat is not slowest)
    more = slowest.own_s / usual_s - 1 if usual_s else 0.0
    words = (
        f"rank {slowest.rank} on {slowest.node}: {more:.0%} more time in {' and '.join(OWN)} than "
        f"the others; now in {slowest.phase} of step {slowest.step}"
    )
    value = {
        "rank": slowest.rank,
        "node": slowest.node,
        "phase": slowest.phase,
        "step": slowest.step,
        "more": more,
    }
    return Line("slowest rank", words, value)


def _is_done(tries: Sequence[Fence]) -> bool:
    """Return whether the newest attempt ended the run: after all steps, or as patience had it."""
    end = tries[-1].ending() if tries else None
    return end is not None and not end.signal and end.code == EXIT_DONE


def _attempt(attempt: Fence) -> str:
    """Return where an attempt ran, when, and how it ended."""
    owner, end = attempt.owner(), attempt.ending()
    words = []
    if owner:
        job = f", job {owner.job} (restart {owner.restart})" if owner.job else ""
        words.append(f"{owner.launcher} on {owner.nodes or owner.host}{job}, since {owner.started}")
    if end is None and attempt.under_way():
        words.append("no end yet")
    elif end is None:
        words.append("no end written: killed, with its launcher")
    elif end.closed_by:
        words.append(str(end))
    else:
        words.append(f"until {end.time}: {_how(end)}")
    return ", ".join(words)


def _attempt_of(attempt: Fence) -> dict[str, object]:
    """Return the same for scripts."""
    owner, end = attempt.owner(), attempt.ending()
    return {
        "attempt": attempt.number,
        "owner": asdict(owner) if owner else None,
        "end": asdict(end) if end else None,
    }


def _how(end: End) -> str:
    if end.signal:
        return f"killed by {end.signal}"
    return ENDS.get(end.code, "failed") + f" (exit code {end.code})"


def _clock(seconds: float) -> str:
    """Return a moment of the epoch as people read it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
