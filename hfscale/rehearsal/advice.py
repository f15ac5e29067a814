"""What the config should say, from what a rehearsal has measured and what the cluster says of
itself. Nothing here fails: a rehearsal that came through is told what would be better.

What is measured is of the small model. A save of the whole one is reckoned from its bytes and the
rate at which all ranks wrote; how long its step takes is not known here (`hfscale plan`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.monitor.metrics_log import Logged
from hfscale.rehearsal.plan import Event, Plan
from hfscale.reports.goodput import ledger

ENGINE = "engine"  # of a checkpoint: what grows with the model
COST = 0.02  # share of the time that saves, or starts, may take
SPARE_S = 30  # for the step under way


def checkpoint_bytes(run_dir: Path, plan: Plan) -> float:
    """Return what a checkpoint of the whole model takes: as that of the small one, a parameter."""
    saved = layout.committed(run_dir / run_files.CHECKPOINTS)
    if not saved or not plan.small.trained:
        return 0.0
    files = [file for file in (saved[-1] / ENGINE).rglob("*") if file.is_file()]
    own = sum(file.stat().st_size for file in files)
    return own / plan.small.trained * plan.whole.trained


def space(run_dir: Path, plan: Plan) -> dict[str, object]:
    """Return whether the disk has room for the checkpoints of the whole model, as a stage."""
    one = checkpoint_bytes(run_dir, plan)
    if not one:
        words = "no checkpoint says how large those of the whole model will be"
        return {"state": "left out", "words": words}
    count = plan.asked.keep_last + 1  # the next one is written before the oldest is removed
    free = shutil.disk_usage(plan.asked.root).free
    words = (
        f"{count} checkpoints of {_size(one)} need {_size(count * one)}, and "
        f"{_size(free)} are free in {plan.asked.root}"
    )
    if free > count * one:
        return {"state": "ok", "words": words}
    return {"state": "warn", "words": words}


def advise(
    run_dir: Path, plan: Plan, events: Sequence[Event], records: Sequence[Logged]
) -> list[str]:
    """Return lines of advice, each with its figures and the line of the config to take."""
    writing = [one for one in events if one.what == "writing"]
    if not writing or not records:
        return []
    rate = writing[-1].bytes / max(writing[-1].seconds, 1e-6)
    save_s = checkpoint_bytes(run_dir, plan) / rate
    start_s = _start_s(run_dir)
    lines = [*_saves(plan, save_s=save_s, rate=rate)]
    if plan.launcher == "slurm":
        lines += _warning(plan, save_s=save_s)
        lines += _limit(plan, start_s=start_s)
        lines += _cluster(plan.cluster, save_s=save_s)
    return lines


def _start_s(run_dir: Path) -> float:
    """Return how long a start took, from the launcher to the end of the first step's delay."""
    starts = [sum(one.start.values()) for one in ledger(run_dir).attempts]
    return max(starts, default=0.0)


def _saves(plan: Plan, *, save_s: float, rate: float) -> Iterator[str]:
    least_min = math.ceil(save_s / COST / 60)
    asked = plan.asked.every_minutes
    measured = f"a save of the whole model takes about {save_s:.0f} s at {rate / 1e6:,.0f} MB/s"
    if asked is not None and asked < least_min:
        yield (
            f"checkpoint.every_minutes={least_min}: {measured}; every {asked:g} minutes they would "
            f"take {save_s / asked / 60:.0%} of the time where they are waited for"
        )
    else:
        yield f"{measured}: what the config says of saves is fine"


def _warning(plan: Plan, *, save_s: float) -> Iterator[str]:
    least = SPARE_S + math.ceil(1.5 * save_s)
    left = plan.asked.signal_s - save_s
    if plan.asked.signal_s < least:
        yield (
            f"cluster.signal_s={least}: Slurm warns {plan.asked.signal_s} s before the limit, and "
            f"a save takes {save_s:.0f} s, after the step that is under way"
        )
    else:
        yield (
            f"cluster.signal_s={plan.asked.signal_s} leaves {left:.0f} s for the step under way "
            "beside a save"
        )


def _limit(plan: Plan, *, start_s: float) -> Iterator[str]:
    least_s = start_s / COST + plan.asked.signal_s
    asked_s = seconds(plan.asked.time or plan.cluster.get("MaxTime", ""))
    if asked_s is not None and asked_s < least_s:
        yield (
            f"cluster.time={math.ceil(least_s / 60)} (minutes) or more: a start takes "
            f"{start_s:.0f} s, which is {start_s / asked_s:.0%} of a job of {asked_s / 60:.0f} "
            "minutes"
        )
    else:
        yield f"a start takes {start_s:.0f} s: the time limit is long enough for it"


def _cluster(told: Mapping[str, str], *, save_s: float) -> Iterator[str]:
    """What the cluster's own settings mean for a run."""
    kill_s = _number(told.get("KillWait", ""))
    if kill_s is not None and kill_s < save_s:
        yield (
            f"`scancel JOB` gives ranks {kill_s:.0f} s (KillWait), a save takes {save_s:.0f} s: "
            "stop a run with `scancel --signal=USR1 JOB`"
        )
    preempts = told.get("PreemptMode", "OFF").upper()
    if "OFF" in preempts:
        return
    if "preempt_send_user_signal" not in told.get("SlurmctldParameters", ""):
        yield (
            "the cluster preempts without USR1 (no preempt_send_user_signal): ranks hear SIGTERM "
            "at the start of the grace time"
        )
    grace_s = seconds(told.get("GraceTime", ""))
    if grace_s is not None and grace_s < save_s:
        yield (
            f"a preempted job has {grace_s:.0f} s (GraceTime), a save takes {save_s:.0f} s: what "
            "was trained since the last checkpoint is lost then"
        )


def seconds(limit: str) -> float | None:
    """Return a time of Slurm ("00:00:30", "1-00:00:00", "90" minutes) in seconds; None where it is
    none.
    """
    days, _, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts) or not (days.isdigit() or not days):
        return None
    numbers = [int(part) for part in parts]
    if days:
        hours, minutes, rest_s = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, rest_s = numbers
    else:
        hours, (minutes, rest_s) = 0, (*numbers, 0)[:2]
    return float(int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest_s)


def _number(text: str) -> float | None:
    """Return the seconds of "30 sec"."""
    word = text.partition(" ")[0]
    return float(word) if word.isdigit() else None


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
