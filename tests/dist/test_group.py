"""Where ranks meet: a name that a node does not know, and ranks that do not come, are said within
minutes.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch

from hfscale.dist import group
from hfscale.dist.world import Place, World, free_port
from hfscale.errors import ConfigError, LostError


def test_a_first_node_whose_name_is_not_known_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(group, "TRIES", 1)
    with pytest.raises(ConfigError, match="cannot resolve the name of the first node") as refused:
        group.start(World(Place(1, 2), 0, 1, "no-such-node.invalid", 12345))
    assert "--exclude" in str(refused.value)


def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(group, "MEETING", timedelta(seconds=2))
    with pytest.raises(LostError, match="2 ranks did not meet at 127.0.0.1"):
        group.start(World(Place(0, 2), 0, 2, master_port=free_port()))
    with pytest.raises(LostError, match="did not meet"):
        group.start(World(Place(1, 2), 1, 2, master_port=free_port()))


def test_a_port_that_was_taken_meanwhile(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        place = World(Place(0, 1), 0, 1, master_port=other.getsockname()[1])
        with pytest.raises(ConfigError, match="in use"):
            group.start(place)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        with pytest.raises(LostError, match="taken meanwhile"):
            group.start(place)


@pytest.mark.parametrize(("visible", "job", "gpu"), [(8, "", 3), (1, "7", 0), (1, "", None)])
def test_which_gpu_is_a_ranks(monkeypatch: pytest.MonkeyPatch, visible: int, job: str, gpu: int):
    """Slurm may show each task one GPU alone (--gpus-per-task, --gpu-bind)."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    else:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if gpu is None:
        with pytest.raises(ConfigError, match="more ranks on this node than GPUs"):
            group.gpu_of(World(Place(3, 4), 3, 4))
    else:
        assert group.gpu_of(World(Place(3, 4), 3, 4)) == gpu
