"""The process group of a job: NCCL between GPUs, gloo between CPUs, and always a gloo group for small host-side facts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from hfscale.dist.rendezvous import loopback_interface, open_store, prove, taken
from hfscale.dist.world import World
from hfscale.errors import ConfigError

TIMEOUT = timedelta(
    minutes=60
)  # above the longest checkpoint write; hangs are found by their heartbeats, sooner

_host_group: torch_dist.ProcessGroup | None = None


def default_device() -> torch.device:
    """Return the device of a process that works alone: the current GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return what computes: "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def start(world: World) -> torch.device:
    """Join the group and return this rank's device.

    Raises:
        ConfigError: if the rendezvous cannot be reached, its port is taken, or a rank does not know the secret.
    """
    global _host_group
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                "more ranks on this node than GPUs",
                where="LOCAL_RANK",
                value=world.local_rank,
                remedy=f"start at most {torch.cuda.device_count()} ranks here (--procs)",
            )
        torch.cuda.set_device(device)
    if world.on_loopback and (interface := loopback_interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else it listens on the host's own
    try:
        store, world = open_store(world, TIMEOUT)
        os.environ.update(world.export())  # DeepSpeed reads them itself
        torch_dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.world_size,
            timeout=TIMEOUT,
            device_id=device if on_gpu else None,
        )
    except (OSError, RuntimeError, ValueError, torch_dist.DistError) as error:
        if "EADDRINUSE" not in str(error) and "in use" not in str(error):
            raise
        raise taken(world) from error
    _host_group = (
        torch_dist.new_group(backend="gloo", timeout=TIMEOUT) if on_gpu else torch_dist.group.WORLD
    )
    if world.secret:
        prove(world, _host_group)
    return device


@contextmanager
def joined(world: World, *, needed: bool) -> Iterator[None]:
    """Be in the group inside, and leave it together; if that is not ``needed``, only take this rank's GPU. On an error nobody waits.

    Raises:
        ConfigError: as ``start``.
    """
    if needed:
        start(world)
    elif torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    yield
    if needed:
        shutdown()


def host_group() -> torch_dist.ProcessGroup | None:
    """Return the gloo group, for tensors on the CPU and for objects."""
    return _host_group


def barrier() -> None:
    """Return when every rank has come here."""
    if torch_dist.is_initialized():
        torch_dist.barrier(group=_host_group)


def shutdown() -> None:
    """Leave the group together: a rank that just exits can abort the ones still inside a collective."""
    global _host_group
    if not torch_dist.is_initialized():
        return
    barrier()
    _host_group = None
    with suppress(
        RuntimeError
    ):  # the peer may have closed its end first; the barrier above is what mattered
        torch_dist.destroy_process_group()
