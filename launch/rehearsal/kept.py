"""Rehearsals that passed, kept in the user's home by a digest of what a job is made of: the
scripts, site.sh and `cluster:`. Who submits is told whether there was one; nothing is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime
from pathlib import Path

from hfscale.config.schema import Cluster
from hfscale.records import Damaged, Record, parse, read_file
from hfscale.rehearsal.plan import is_rehearsal
from hfscale.shards.files import write_atomically
from launch.job import Job
from launch.share import scripts_home


class Pass(Record):
    """A rehearsal that came through."""

    time: str
    seconds: float
    name: str  # of the run


def digest(cluster: Cluster) -> str:
    """Return what tells one way to submit from another: any change of it asks for a rehearsal."""
    folder = scripts_home(cluster) / "slurm"
    parts = hashlib.sha256(cluster.model_dump_json(exclude={"submitit"}).encode())
    for name in ("train.sbatch", "start.sh", "site.sh"):
        file = folder / name
        parts.update(f"\0{name}\0".encode() + (file.read_bytes() if file.is_file() else b""))
    return parts.hexdigest()[:32]


def _file(cluster: Cluster) -> Path:
    home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return home / "hfscale" / "rehearsed" / f"{digest(cluster)}.json"


def keep(cluster: Cluster, *, name: str, seconds: float) -> None:
    """Write down that a rehearsal with this ``cluster:`` has passed now."""
    file = _file(cluster)
    file.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    one = Pass(time=now, seconds=seconds, name=name)
    write_atomically(file, json.dumps(one.as_dict()).encode())


def said(job: Job) -> list[str]:
    """Return the notice, before ``job`` is submitted, on whether its like was rehearsed."""
    if is_rehearsal(job.folder):
        return []
    try:
        one = parse(Pass, read_file(_file(job.cluster), most=1 << 16))
    except (OSError, Damaged):
        return [
            "no rehearsal has passed with these scripts, site.sh and cluster: - `hfscale rehearse "
            "CONFIG --launcher slurm` finds in minutes what a job finds after its queue"
        ]
    return [f"rehearsed with these scripts and cluster: on {one.time} ({one.name}): passed"]
