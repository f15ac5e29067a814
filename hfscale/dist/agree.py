"""What the ranks agree on before a step's backward pass: one small all-reduce on the host.

Counts, flags and digests are summed as int64, which wraps modulo 2^64: just what the batch digest
wants.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as torch_dist

from hfscale.dist.group import everybody, host_group
from hfscale.dist.rendezvous import exchange
from hfscale.dist.world import Place
from hfscale.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Agreed:
    """The same on every rank. A flag is set if any rank raised it."""

    counts: dict[str, int]  # global number of items of each loss term
    stop: bool
    due: bool
    failed: bool
    save: bool  # the step before
    end: bool
    digest: int  # sum modulo 2^64, as a signed int64


def agree(
    *,
    counts: Mapping[str, int],
    stop: bool,
    due: bool,
    failed: bool,
    save: bool,
    end: bool,
    digest: int,
) -> Agreed:
    """Return the sums over all ranks, in one collective of a few dozen bytes."""
    names = sorted(counts)
    flags = [stop, due, failed, save, end]
    facts = torch.tensor([*flags, digest, *(counts[name] for name in names)], dtype=torch.int64)
    if everybody().size > 1:
        torch_dist.all_reduce(facts, group=host_group())
    stops, dues, failures, saves, ends, total, *sums = facts.tolist()
    return Agreed(
        counts=dict(zip(names, sums, strict=True)),
        stop=stops > 0,
        due=dues > 0,
        failed=failures > 0,
        save=saves > 0,
        end=ends > 0,
        digest=total,
    )


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return ``values`` (any shape, on the host) summed over all ranks, in float64."""
    total = values.detach().to("cpu", torch.float64)
    if everybody().size > 1:
        torch_dist.all_reduce(total, group=host_group())
    return total


def numbers_of_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return every rank's ``values`` (N,; on the host, equally many), as (W, N) on every rank."""
    place = everybody()
    parts = [torch.empty_like(values) for _ in range(place.size)]
    if place.size == 1:
        return values[None]
    torch_dist.all_gather(parts, values, group=host_group())
    return torch.stack(parts)


def from_all_ranks(value: T) -> list[T]:
    """Return every rank's ``value``, on every rank, as JSON has it: keys are texts, a tuple is a
    list. No pickle is opened.
    """
    return exchange(value, host_group())


def same_on_all_ranks(digests: Mapping[str, str]) -> None:
    """Return if every rank has these ``digests`` of its files, by key of the config. Collective.

    Raises:
        DataError: on every rank, if one has other files than rank 0.
    """
    everyone = from_all_ranks((socket.gethostname(), dict(digests)))
    for rank, (host, theirs) in enumerate(everyone):
        for key, digest in everyone[0][1].items():
            if theirs[key] != digest:
                raise DataError(
                    "the ranks would train on different data",
                    where=key,
                    remedy="give every node the same files",
                    value=f"{digest[:12]} on rank 0 ({everyone[0][0]}), {theirs[key][:12]} on "
                    f"rank {rank} ({host})",
                )


def from_rank_0(value: T) -> T:
    """Return rank 0's ``value`` on every rank, as ``from_all_ranks`` has it."""
    return from_all_ranks(value)[0]


def gather_rows(rows: torch.Tensor, place: Place) -> tuple[torch.Tensor, int]:
    """Return the ``rows`` of all ranks of ``place`` (the same number of each) in the order of
    ranks, and where this rank's begin; no gradient.
    """
    if place.size == 1:
        return rows, 0
    parts = [torch.empty_like(rows) for _ in range(place.size)]
    torch_dist.all_gather(parts, rows, group=place.group)
    return torch.cat(parts), place.rank * len(rows)
