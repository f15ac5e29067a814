"""Where a run is, from what it has written: step, loss, speed, expected end, last checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.config.schema import TrainConfig
from hfscale.errors import (
    EXIT_DONE,
    EXIT_HUNG,
    EXIT_STOPPED,
    EXIT_UNHEALTHY,
    EXIT_USER_ERROR,
)
from hfscale.monitor.fence import End, Fence, attempts
from hfscale.monitor.lines import read_lines
from hfscale.records import Count, Record

TAIL_BYTES = 65536
LAST = 5  # attempts that are shown
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


def records(run_dir: Path, *, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a run's metrics in the order in which they were logged, but for what a
    kill has torn; none if there is no run.

    With ``last_bytes`` only those that lie in them as a whole.
    """
    for record in read_lines(run_dir / run_files.METRICS, Metrics, last_bytes=last_bytes):
        yield record.as_dict()


def last_record(run_dir: Path) -> dict[str, Any]:
    """Return the newest whole record of a run's metrics; empty if there is none."""
    return [{}, *records(run_dir, last_bytes=TAIL_BYTES)][-1]


def progress(config: TrainConfig, record: dict[str, Any]) -> float:
    """Return which part of the run is done, in [0, 1]."""
    train = config.train
    done = (
        (record["step"], train.steps),
        (record["tokens_seen"], train.tokens),
        (record.get("epoch"), train.epochs),
    )
    return min(1.0, next((have / whole for have, whole in done if have is not None and whole), 0.0))


def steps_left(config: TrainConfig, record: dict[str, Any]) -> float:
    """Return how many steps of the present batch are left.

    Of a run of epochs, as if it had always had that batch: a record does not tell the rows of an
    epoch.
    """
    train, part = config.train, progress(config, record)
    if train.steps is not None:
        return max(0, train.steps - record["step"])
    if train.tokens is not None:
        rows = (train.tokens - record["tokens_seen"]) / config.data.seq_len
        return max(0.0, rows / train.global_batch)
    return record["step"] * (1 - part) / part if part else 0.0


def describe(
    config: TrainConfig, *, now: float | None = None, running: bool = True
) -> list[tuple[str, str]]:
    """Return (name, value) lines on a run; ``now`` is in seconds of the epoch. One that is not
    ``running`` has no expected end.
    """
    now, run = time.time() if now is None else now, config.run_dir
    record, saved = last_record(run), layout.committed(run / run_files.CHECKPOINTS)
    lines, tries = [("run", str(run))], attempts(run)
    if record:
        part, quiet_s = progress(config, record), now - os.stat(run / run_files.METRICS).st_mtime
        left_s = steps_left(config, record) * record["step_s"]
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + left_s))
        left = f"{_time(left_s)} of training left"
        end = f"{at} ({left})" if running else f"not while it does not run ({left})"
        if part == 1.0 or _is_done(tries):
            end = "done"
        lines += [
            ("step", f"{record['step']:,} ({part:.1%}), logged {_time(quiet_s)} ago"),
            ("loss", f"{record['loss']:.4f}"),
            (
                "speed",
                f"{record['tokens_per_s']:,.0f} tokens/s, {record['step_s']:.3g} s a step, "
                f"{record['data_wait_s'] / max(record['step_s'], 1e-9):.0%} of it waiting for data",
            ),
            ("expected end", end),
        ]
    else:
        lines.append(("step", "none was logged yet"))
    last = (
        f"step {layout.step_of(saved[-1]):,}, "
        f"{_time(now - os.stat(saved[-1] / layout.MANIFEST).st_mtime)} ago"
        if saved
        else "none"
    )
    return [
        *lines,
        ("last checkpoint", last),
        # runs of 0.1 have them in the record alone
        ("attempts", str(max([record.get("attempt", 0), *(one.number for one in tries)]))),
        *((f"attempt {one.number}", _attempt(one)) for one in tries[-LAST:]),
    ]


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
    if end is None:
        words.append("no end yet")
    elif end.closed_by:
        words.append(str(end))
    else:
        words.append(f"until {end.time}: {_how(end)}")
    return ", ".join(words)


def _how(end: End) -> str:
    if end.signal:
        return f"killed by {end.signal}"
    return ENDS.get(end.code, "failed") + f" (exit code {end.code})"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
