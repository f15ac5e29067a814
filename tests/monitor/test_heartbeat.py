"""Heartbeats: what a rank writes, who is to blame, and what may take long. Hangs of real ranks are
in tests/launch/test_hang.py.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hfscale.monitor import heartbeat
from hfscale.monitor.beats import Beat, odd_ones, read_beats, slow_ranks
from hfscale.monitor.heartbeat import LONG_S, Heartbeat, beat, slow_lately, watching
from tests.helpers.slurm import wait_for


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Heartbeat]:
    with watching(tmp_path, rank=3, ranks=4, node="n7", timeout_s=60.0, on_hang=lambda rank: None):
        assert heartbeat._current is not None
        yield heartbeat._current


def test_what_a_rank_does_can_be_read_by_others(watched: Heartbeat, tmp_path: Path):
    assert read_beats(tmp_path, [3, 2]) == [Beat(3, 1, 0, "start", 0.0, os.getpid(), "n7"), Beat(2)]
    beat("data", 12)
    time.sleep(0.05)
    beat("collective")
    wait_for(lambda: read_beats(tmp_path, [3])[0].count == 3, timeout_s=3)  # written once a second
    [seen] = read_beats(tmp_path, [3])
    assert (seen.step, seen.phase) == (12, "collective")
    assert seen.own_s >= 0.05, "the time spent in data"
    assert (tmp_path / "heartbeats" / "rank-3").stat().st_size == heartbeat.WIDTH, (
        "one line, written over"
    )


def test_a_disk_that_does_not_answer_costs_no_step(
    watched: Heartbeat, monkeypatch: pytest.MonkeyPatch
):
    """Every write of a heartbeat sleeps, as on a slow file system: the training thread makes
    none.
    """
    writers = set()

    def slow(*_: object) -> int:
        writers.add(threading.current_thread())
        time.sleep(0.2)
        return 0

    monkeypatch.setattr(os, "pwrite", slow)
    began = time.perf_counter()
    for step in range(1000):
        beat("data", step)
        beat("forward")
    assert time.perf_counter() - began < 0.5
    wait_for(lambda: writers, timeout_s=3)
    assert threading.main_thread() not in writers


def test_start_first_step_and_saves_may_take_long(watched: Heartbeat):
    assert watched.limit_s() == LONG_S, "starting"
    beat("data", 7)
    assert watched.limit_s() == LONG_S, "the first step of an attempt, which compiles"
    beat("data", 8)
    assert watched.limit_s() == 60.0
    beat("save")
    assert watched.limit_s() == LONG_S
    beat("validation")
    assert watched.limit_s() == 60.0, "it beats at every batch"


def test_without_a_limit_nothing_is_watched_or_written(tmp_path: Path):
    with watching(tmp_path, rank=0, ranks=1, node="n1", timeout_s=None, on_hang=lambda rank: None):
        beat("data", 1)
    assert list(tmp_path.iterdir()) == []


def at(*counts: int) -> list[Beat]:
    return [Beat(rank, count, 5, "data", node=f"n{rank}") for rank, count in enumerate(counts)]


@pytest.mark.parametrize(
    ("counts", "silent", "waiting", "odd"),
    [
        ((9, 8, 9, 9), [], [], [1]),  # behind: the others wait for it
        ((9, 9, 9, 9), [2], [], [2]),  # does not answer
        ((9, 8, 9, 9), [2], [], [2]),
        ((9, 9, 9, 9), [], [0, 1, 2], [3]),  # all equally far, but it does not wait
        ((9, 9, 9, 9), [], [0, 1, 2, 3], []),  # the network
        ((8, 8, 9, 9), [], [], [0, 1]),
        ((4,), [], [], [0]),
    ],
)
def test_who_is_to_blame(
    counts: tuple[int, ...], silent: list[int], waiting: list[int], odd: list[int]
):
    assert [beat.rank for beat in odd_ones(at(*counts), silent=silent, waiting=waiting)] == odd


def test_a_slow_rank_is_named():
    old = [Beat(rank, 1, 10, "data", 1.0, 1, f"n{rank}", 0.1) for rank in range(4)]
    new = [
        Beat(rank, 99, 20, "data", 1.0 + own_s, 1, f"n{rank}", 0.1 + data_s)
        for rank, (own_s, data_s) in enumerate([(2.0, 0.2), (2.2, 0.2), (6.0, 3.9), (2.1, 0.2)])
    ]
    assert list(map(str, slow_ranks(old, new))) == [
        "rank 2 on n2 is slow in data: 0.60 s a step for data and forward, the others 0.21 s"
    ]
    [in_forward] = slow_ranks(old, [replace(beat, data_s=0.3) for beat in new])
    assert in_forward.phase == "forward"
    assert slow_ranks([], new) == [], "the first look"
    assert slow_ranks(new, new) == [], "no step was made in between"


def test_slow_ranks_are_told_once(watched: Heartbeat):
    watched.slow = slow_ranks(
        [Beat(0, 1, 1), Beat(1, 1, 1)], [Beat(0, 9, 2, own_s=0.1), Beat(1, 9, 2, own_s=1.0)]
    )
    assert [one.rank for one in slow_lately()] == [1] and slow_lately() == []
