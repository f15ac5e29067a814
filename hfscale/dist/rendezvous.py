"""Where the ranks meet: a store that listens on the loopback alone where all are on one machine,
and a secret that each must know.

torch's own rendezvous listens on every interface and believes whoever comes. Here:

on one machine   the launcher binds 127.0.0.1 and hands the listening socket to rank 0: nobody else
                 can reach the port, or take it
on several       the store must listen for other hosts; its keys lie under a name that is made of
                 the secret, and each rank proves that it knows the secret before anything else is
                 said

What ranks tell one another is JSON, never a pickle: a pickle runs whatever it says.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_dist

from hfscale.dist.secret import SECRET
from hfscale.dist.world import LISTEN_FD, World, listen
from hfscale.errors import ConfigError

T = TypeVar("T")


def open_store(
    world: World, *, meeting: timedelta, timeout: timedelta
) -> tuple[torch_dist.Store, World]:
    """Return the store through which the ranks find each other, once all have come, and the world
    with the port that it has.

    ``meeting`` is how long the first waits for the last, ``timeout`` how long they wait for each
    other's keys later.

    Raises:
        OSError: if this rank has to listen, and cannot.
    """
    master = world.all.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    handle = world.listen_fd
    os.environ.pop(LISTEN_FD, None)  # of this process, not of those that it starts
    if master and handle is None and world.on_loopback:
        listener = listen(world.master_port)
        world = world.at(listener.getsockname()[1])
        handle = listener.detach()
    store: torch_dist.Store = torch_dist.TCPStore(
        "127.0.0.1" if master and world.on_loopback else world.master_addr,
        world.master_port,
        world.all.size,
        is_master=master,
        timeout=meeting,
        master_listen_fd=handle if master else None,
    )
    store.set_timeout(timeout)
    if world.secret:
        store = torch_dist.PrefixStore(_digest(world.secret, "the name of the keys"), store)
    return store, replace(world, listen_fd=None)


def exchange(value: T, group: torch_dist.ProcessGroup | None) -> list[T]:
    """Return every rank's ``value`` as JSON has it (a tuple is a list then), on every rank of a
    gloo ``group``.
    """
    text = json.dumps(value).encode()
    if not torch_dist.is_initialized():
        return [json.loads(text)]
    ranks = torch_dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    torch_dist.all_gather(sizes, torch.tensor([len(text)]), group=group)
    lengths = [int(one) for one in sizes]
    mine = torch.zeros(max(lengths), dtype=torch.uint8)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = [torch.empty_like(mine) for _ in range(ranks)]
    torch_dist.all_gather(texts, mine, group=group)
    return [
        json.loads(bytes(one[:length].numpy())) for one, length in zip(texts, lengths, strict=True)
    ]


def prove(world: World, group: torch_dist.ProcessGroup | None) -> None:
    """Return if every rank knows the secret of this job. Collective.

    Raises:
        ConfigError: naming the ranks that do not.
    """
    nonce = exchange(secrets.token_hex(16), group)  # so that no answer of another time will do
    answers = exchange(_digest(world.secret, f"{world.all.rank} {nonce}"), group)
    wrong = [
        rank
        for rank, answer in enumerate(answers)
        if not hmac.compare_digest(str(answer), _digest(world.secret, f"{rank} {nonce}"))
    ]
    if wrong:
        raise ConfigError(
            "somebody else took the place of a rank: it does not know the secret of this job",
            where=f"{world.master_addr}:{world.master_port}",
            value=f"rank {', '.join(map(str, wrong))}",
            remedy=f"start the job again; the secret is the file {SECRET!r} beside its config.yaml",
        )


def taken(world: World) -> ConfigError:
    """Return the error to raise where another process has the port."""
    return ConfigError(
        "the port of the rendezvous is in use",
        where=f"{world.master_addr}:{world.master_port}",
        remedy="choose another MASTER_PORT, or let the launcher choose a free one",
    )


def _digest(secret: str, text: str) -> str:
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def loopback_interface() -> str:
    """Return the name of the interface that leads nowhere else, or "" where there is none of the
    usual names.
    """
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), "")
