"""Heartbeats as they are read: what each rank did last, who is to blame for a hang, who is slow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from hfscale.run_files import HEARTBEATS

DATA = "data"
OWN = (DATA, "forward")  # where a rank works by itself, whatever the others do (but for ZeRO 3)
SLOW = 2.0  # how many times the others' time is slow
LEAST_S = 0.05  # more than the others, a step


@dataclass(frozen=True)
class Beat:
    """What a rank does. ``count`` is of all phases so far, ``own_s`` the time spent in those of
    ``OWN``, ``data_s`` that in the first of them.
    """

    rank: int
    count: int = -1
    step: int = 0
    phase: str = "not_started"
    own_s: float = 0.0
    pid: int = 0
    node: str = "?"
    data_s: float = 0.0


@dataclass(frozen=True)
class Slow:
    """A rank that takes much longer than the others for what it does by itself."""

    rank: int
    node: str
    phase: str  # in which most of it is lost
    step_s: float  # of its own work, a step
    usual_s: float  # of the others

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.node} is slow in {self.phase}: {self.step_s:.2f} s a step "
            f"for {' and '.join(OWN)}, the others {self.usual_s:.2f} s"
        )


def read_beats(run_dir: Path, ranks: Sequence[int]) -> list[Beat]:
    """Return the last beat of each of ``ranks``."""
    beats = {rank: Beat(rank) for rank in ranks}
    for rank in ranks:
        with suppress(OSError, ValueError):
            count, step, phase, own_s, pid, node, *more = (
                (run_dir / HEARTBEATS / f"rank-{rank}").read_text().split()
            )
            data_s = float(more[0]) if more else 0.0  # version 0.1 did not tell it
            beats[rank] = Beat(
                rank, int(count), int(step), phase, float(own_s), int(pid), node, data_s
            )
    return list(beats.values())


def last_beat(run_dir: Path) -> tuple[float, Beat] | None:
    """Return when a rank of the run was last heard (seconds of the epoch), and what it did then."""
    heard = []
    with suppress(OSError):
        for file in os.scandir(run_dir / HEARTBEATS):
            rank = file.name.removeprefix("rank-")
            if rank.isdecimal():
                heard.append((file.stat().st_mtime, int(rank)))
    if not heard:
        return None
    seconds, last = max(heard)
    return seconds, read_beats(run_dir, [last])[0]


def odd_ones(beats: Sequence[Beat], *, silent: Sequence[int], waiting: Sequence[int]) -> list[Beat]:
    """Return the ranks to blame: those that do not answer, else those that are behind, else those
    that are not ``waiting`` for others.

    Nobody, if that would be everybody.
    """
    fewest = min(beat.count for beat in beats)
    mute = [beat for beat in beats if beat.rank in silent]
    behind = [beat for beat in beats if beat.count == fewest]
    busy = [beat for beat in beats if beat.rank not in waiting]
    for odd in (mute, behind, busy):
        if odd and (len(odd) < len(beats) or len(beats) == 1):
            return odd
    return []


def slow_ranks(earlier: Sequence[Beat], beats: Sequence[Beat]) -> list[Slow]:
    """Return each rank that takes ``SLOW`` times as long as the others for what it does by itself,
    per step.
    """
    if len(beats) < 2 or len(earlier) != len(beats):
        return []
    steps = [new.step - old.step for old, new in zip(earlier, beats, strict=True)]
    if min(steps) <= 0:
        return []
    own_s = [(new.own_s - old.own_s) / n for old, new, n in zip(earlier, beats, steps, strict=True)]
    data_s = [
        (new.data_s - old.data_s) / n for old, new, n in zip(earlier, beats, steps, strict=True)
    ]
    usual_s, usual_data_s = (median(sorted(times)[:-1]) for times in (own_s, data_s))
    slow = []
    for beat, mine_s, mine_data_s in zip(beats, own_s, data_s, strict=True):
        more_s = mine_s - usual_s
        if mine_s > SLOW * usual_s and more_s > LEAST_S:
            phase = OWN[0] if mine_data_s - usual_data_s > more_s / 2 else OWN[1]
            slow.append(Slow(beat.rank, beat.node, phase, mine_s, usual_s))
    return slow
