"""The process group of a job: NCCL between GPUs, gloo between CPUs, and always a gloo group for
small host-side facts.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from hfscale.dist.rendezvous import loopback_interface, open_store, prove, taken
from hfscale.dist.world import Place, World, allocation, node_name
from hfscale.errors import ConfigError, LostError

# above the longest checkpoint write; hangs are found by their heartbeats, sooner
TIMEOUT = timedelta(minutes=60)
# from the first rank that comes to the last: imports, on slow disks
MEETING = timedelta(minutes=10)
TRIES = 5  # to resolve a name, a second apart

_host_group: torch_dist.ProcessGroup | None = None


def default_device() -> torch.device:
    """Return the device of a process that works alone: the current GPU if there is one, else the
    CPU.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return what computes: "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def start(world: World) -> torch.device:
    """Join the group and return this rank's device.

    Raises:
        ConfigError, LostError: if the rendezvous cannot be reached, its port is taken, or a rank
            does not know the secret.
    """
    global _host_group
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", gpu_of(world)) if on_gpu else torch.device("cpu")
    # DeepSpeed reads them itself, and takes the GPU of LOCAL_RANK
    os.environ.update(world.export())
    if on_gpu:
        os.environ["LOCAL_RANK"] = str(device.index)
        torch.cuda.set_device(device)
    if world.on_loopback and (interface := loopback_interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else it listens on the host's own
    store, world = _store(world)
    os.environ["MASTER_PORT"] = str(world.master_port)  # a world of one picks it now
    torch_dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=world.all.rank,
        world_size=world.all.size,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
    )
    _host_group = (
        torch_dist.new_group(backend="gloo", timeout=TIMEOUT) if on_gpu else torch_dist.group.WORLD
    )
    if world.secret:
        prove(world, _host_group)
    return device


def gpu_of(world: World) -> int:
    """Return which of the visible GPUs is this rank's: that of its number on this node, or the only
    one that Slurm shows it.

    Raises:
        ConfigError: if there are more ranks than GPUs.
    """
    visible = torch.cuda.device_count()
    if world.local_rank < visible:
        return world.local_rank
    if visible == 1 and allocation():  # --gpus-per-task, --gpu-bind: NCCL refuses two on the same
        return 0
    raise ConfigError(
        "more ranks on this node than GPUs",
        where="LOCAL_RANK",
        value=world.local_rank,
        remedy=f"start at most {visible} ranks here (--procs)",
    )


def _store(world: World) -> tuple[torch_dist.Store, World]:
    """Return where the ranks meet, once all have come, and the world with the port that it has.

    Raises:
        ConfigError: if this node does not know the address, or the port is taken.
        LostError: if not all ranks came in ``MEETING``; or the port is taken in a Slurm job, whose
            next attempt gets another one.
    """
    place = f"{world.master_addr}:{world.master_port}"
    if not world.on_loopback:
        _resolve(world.master_addr)
    try:
        return open_store(world, meeting=MEETING, timeout=TIMEOUT)
    except (OSError, RuntimeError, ValueError, torch_dist.DistError) as error:
        message = str(error).lower()
        if "eaddrinuse" in message or "in use" in message:
            if allocation():
                raise LostError(
                    f"the port of the rendezvous was taken meanwhile: {place}"
                ) from error
            raise taken(world) from error
        if "timed out" in message or "timeout" in message:
            raise LostError(
                f"{world.all.size} ranks did not meet at {place} in {MEETING}: one has not "
                "started, or cannot "
                "reach it (a firewall, another network): `hfscale doctor` looks at each node"
            ) from error
        raise


def _resolve(host: str) -> None:
    """Return if this node knows the address of ``host``; torch would try for an hour, and not say
    so.

    Raises:
        ConfigError: if it does not.
    """
    for left in reversed(range(TRIES)):
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if left:
                time.sleep(1)
                continue
            raise ConfigError(
                f"{node_name()} cannot resolve the name of the first node: {error.strerror}",
                where="MASTER_ADDR",
                value=host,
                remedy=f"mend name resolution on {node_name()} (`getent hosts {host}` there), "
                "or leave it out (--exclude)",
            ) from None


@contextmanager
def joined(world: World, *, needed: bool) -> Iterator[None]:
    """Be in the group inside, and leave it together; if that is not ``needed``, only take this
    rank's GPU. On an error nobody waits.

    Raises:
        ConfigError: as ``start``.
    """
    if needed:
        start(world)
    elif torch.cuda.is_available():
        torch.cuda.set_device(gpu_of(world))
    yield
    if needed:
        shutdown()


def everybody() -> Place:
    """Return the place among all ranks of the group that is up; alone where there is none."""
    if not torch_dist.is_initialized():
        return Place()
    return Place(torch_dist.get_rank(), torch_dist.get_world_size())


def host_group() -> torch_dist.ProcessGroup | None:
    """Return the gloo group, for tensors on the CPU and for objects."""
    return _host_group


def barrier() -> None:
    """Return when every rank has come here."""
    if torch_dist.is_initialized():
        torch_dist.barrier(group=_host_group)


def shutdown() -> None:
    """Leave the group together: a rank that just exits can abort the ones still inside a
    collective.
    """
    global _host_group
    if not torch_dist.is_initialized():
        return
    barrier()
    _host_group = None
    # the peer may have closed its end first; the barrier above is what mattered
    with suppress(RuntimeError):
        torch_dist.destroy_process_group()
