"""The helper that multi-rank tests stand on."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankFailure, run_ranks


def total(x: float) -> float:
    value = torch.tensor(x + dist.get_rank())
    dist.all_reduce(value)
    return value.item()


def pid() -> int:
    return os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("about to fail")
        raise ValueError("no good")
    dist.barrier()


def die() -> None:
    sys.stderr.write("last words\n")
    os._exit(3)


def sleep() -> None:
    time.sleep(60)


def test_results_come_back_in_order_and_ranks_are_reused():
    assert run_ranks(total, 2, 3.0) == [7.0, 7.0]
    assert run_ranks(pid, 2) == run_ranks(pid, 2)
    assert run_ranks(pid, 2) != run_ranks(pid, 2, fresh=True)


def test_a_failing_rank_shows_its_traceback_and_output_and_does_not_hang_the_others():
    with pytest.raises(RankFailure, match=r"(?s)rank 1 raised.*ValueError: no good.*about to fail"):
        run_ranks(fail_on, 2, 1)
    assert run_ranks(total, 2, 0.0) == [1.0, 1.0]


def test_a_dead_rank_is_named():
    with pytest.raises(RankFailure, match=r"(?s)ended with exit code 3.*last words"):
        run_ranks(die, 2)


def test_a_hang_shows_the_stacks():
    run_ranks(pid, 1)  # the rank is up, and has imported this module
    with pytest.raises(RankFailure, match=r"(?s)ranks \[0\] did not answer in 3 s.*in sleep"):
        run_ranks(sleep, 1, timeout_s=3)


def test_a_local_function_is_refused():
    with pytest.raises(ValueError, match="top of its module"):
        run_ranks(lambda: None, 1)
