"""What only the ranks of an attempt know of it, added to the run's ``environment.json``: hosts,
devices, driver, data, tokenizer.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path

import torch

from hfscale import run_files
from hfscale.dist.agree import from_all_ranks
from hfscale.dist.group import device_name
from hfscale.dist.world import World
from hfscale.records import load
from hfscale.shards.files import write_atomically

DRIVER = Path("/proc/driver/nvidia/version")


def record_ranks(
    run_dir: Path, world: World, device: torch.device, *, described: dict[str, object]
) -> None:
    """Complete the newest attempt's entry. Collective. One that is complete is of an earlier start,
    so another entry is added.
    """
    ranks = from_all_ranks(f"{socket.gethostname()}: {device_name(device)}")
    file = run_dir / run_files.ENVIRONMENT
    if world.all.rank:
        return
    attempts = (
        load(file, list[dict[str, object]], what="the record of attempts") if file.is_file() else []
    )
    if not attempts or "ranks" in attempts[-1]:
        attempts.append({})
    attempts[-1] |= {
        "ranks": ranks,
        "driver": DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        **described,
    }
    write_atomically(file, json.dumps(attempts, indent=1, ensure_ascii=False).encode())
