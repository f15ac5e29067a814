"""Where a rehearsal takes place: on this machine, or in a job of Slurm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hfscale.dist.world import available_cores
from launch.interpreter import python
from launch.job import Training
from launch.local import gpu_count
from launch.rehearsal import cluster
from launch.rehearsal.private import LEFT_OUT
from launch.slurm import tasks_per_node


@dataclass(frozen=True)
class Where:
    """A launcher, and what it starts."""

    launcher: Literal["local", "slurm"]
    ranks: int
    gpus: int  # of a node
    python: Sequence[str]  # what stands between python's own name and the words of a command
    overrides: Sequence[str] = ()  # of `cluster:`
    limit_s: int = 0  # of the job
    signal_s: int = 0  # so long before it Slurm warns
    told: Mapping[str, str] = field(default_factory=dict)  # what Slurm says of itself
    left_out: Mapping[str, str] = field(default_factory=dict)  # what is not tried here -> why


def here(job: Training) -> Where:
    """Return this machine, with as many ranks as ``hfscale pretrain`` would start."""
    gpus = gpu_count()
    ranks = job.procs or gpus or min(2, available_cores())
    return Where("local", ranks, gpus, python("launch.cli")[1:])


def on_cluster(job: Training, *, warned: bool, private: bool = False) -> Where:
    """Return a short job on at most two nodes, as ``cluster:`` asks for it, which Slurm is to have
    ``warned`` of its time limit. Of a ``private`` Slurm the settings say nothing of the cluster's.
    """
    asked = job.cluster
    overrides, limit_s = cluster.smaller(asked, warned=warned)
    return Where(
        "slurm",
        min(2, asked.nodes) * tasks_per_node(asked),
        asked.gpus_per_node or 0,
        python("launch.cli", root=".")[1:],  # of the snapshot, in which the job runs
        overrides,
        limit_s,
        asked.signal_s,
        {} if private else cluster.described(asked),
        LEFT_OUT if private else {},
    )
