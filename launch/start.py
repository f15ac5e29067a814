"""What can be known before a job starts, and the job as the list of checks sees it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from hfscale.checks.needs import Needs, needs_of
from hfscale.errors import ConfigError, UserError
from hfscale.reports.status import last_record
from launch.job import Job, Training
from launch.queue import seconds

LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run", tempfile.gettempdir())
LOCAL_KINDS = ("tmpfs", "ramfs", "devtmpfs", "squashfs")


class Start:
    """A start of ``job`` in ``procs`` ranks on this machine, or on ``nodes`` of a cluster: what
    ``hfscale/checks/start.py`` asks. Without a job there is a machine alone.
    """

    def __init__(
        self,
        job: Job | None,
        *,
        procs: int,
        gpus: bool,
        nodes: int = 1,
        slurm: tuple[bool, str] = (True, "not asked: the ranks are on this machine"),
    ) -> None:
        """``slurm``: whether the queue answers, and what it said."""
        self.slurm = slurm
        self.job, self.procs, self.gpus, self.nodes = job, procs, gpus, nodes
        self.folder = job.folder if job else Path.cwd()
        self.expected = ""  # when it would begin

    @cached_property
    def needs(self) -> Needs:
        """What is known of the run: nothing where it is none, or cannot be built."""
        none = Needs(ranks=self.procs, nodes=self.nodes, on_gpu=self.gpus)
        if not isinstance(self.job, Training):
            return none
        logged = last_record(self.folder).get("tokens_per_s", 0.0)
        try:
            return needs_of(
                self.job.run,
                ranks=self.procs,
                nodes=self.nodes,
                on_gpu=self.gpus,
                tokens_per_s=float(logged),
            )
        except UserError:  # the check of the parts says which
            return none

    def queue(self) -> tuple[bool, str]:
        """Return what Slurm said."""
        return self.slurm

    def config(self) -> Sequence[str] | None:
        """Return notices on the config."""
        if self.job is None:
            return None
        return self.job.check(self.procs, device_type="cuda" if self.gpus else "cpu")

    def allocation(self) -> Sequence[str] | None:
        """Return None: there is none."""
        return None

    def scripts(self) -> Sequence[str] | None:
        """Return None: there is no job script."""
        return None

    def request(self) -> Sequence[str] | None:
        """Return None: nothing is submitted."""
        return None

    def parts(self) -> Sequence[str] | None:
        """Return no notices if the parts fit: they are logged as they are found."""
        if self.job is None:
            return None
        self.job.check_parts()
        return []


def before(
    job: Job,
    procs: int,
    *,
    gpus: bool,
    on_nodes: bool = True,
    limit: str | None = None,
) -> list[str]:
    """Return notices on ``procs`` ranks of a job, after looking at all that can be known without
    asking Slurm or importing torch.

    ``limit`` is the time limit of the job around this, as Slurm writes it, where it is known.

    Raises:
        UserError: for the first thing that speaks against it.
    """
    said = job.check(procs, device_type="cuda" if gpus else "cpu")
    if on_nodes:
        _refuse_local_disk(job)
    job.fetch()  # into the cache, where the nodes find it: they have no network
    return [*said, *(time_to_save(job, limit) if on_nodes else ())]


def time_to_save(job: Job, limit: str | None = None) -> list[str]:
    """Return a notice if saves were seen to take longer than the time between Slurm's signal and
    the end.

    ``limit`` is that of the job; without it, what the config asks for.

    Raises:
        ConfigError: if the time limit leaves no time to train.
    """
    cluster, needed = job.cluster, job.stops_in()
    limit = limit or cluster.time
    if limit and limit[0].isdigit() and seconds(limit) <= max(cluster.signal_s, needed):
        why = (
            f"step and save take {needed:.0f} s, and the ranks are told to save "
            f"{cluster.signal_s} s (cluster.signal_s) before the end"
        )
        raise ConfigError(
            f"the time limit leaves no time to {job.does}: {why}",
            where="cluster.time",
            value=limit,
            remedy="ask for more; or for a later warning, if a step and a save are shorter: "
            "cluster.signal_s=60 "
            "(by hand: sbatch --signal=USR1@60 ... cluster.signal_s=60)",
        )
    if needed > cluster.signal_s:
        return [
            f"step and save took {needed:.0f} s, Slurm warns {cluster.signal_s} s ahead: "
            f"better cluster.signal_s={2 * needed:.0f}"
        ]
    return []


def _refuse_local_disk(job: Job) -> None:
    """Return if the job's folder and hub cache are, as far as one can see, on a disk that every
    node sees.

    Raises:
        ConfigError: naming the one that is not.
    """
    places = {job.place[1]: job.folder}
    if job.from_hub():
        places["HF_HOME"] = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for where, path in places.items():
        if not job.cluster.allow_local_disk and (kind := local_kind(path)):
            raise ConfigError(
                f"this folder is on {kind}, which other nodes do not see",
                where=where,
                value=str(path),
                remedy="choose one on a shared file system, or cluster.allow_local_disk=true "
                "if it is one",
            )


def local_kind(path: Path) -> str | None:
    """Return what kind of place of this node alone ``path`` is in; None where it seems shared."""
    path = Path(os.path.realpath(path))
    for folder in LOCAL_FOLDERS:
        if path.is_relative_to(os.path.realpath(folder)):
            return folder
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    _, kind = max(
        (len(fields[1]), fields[2]) for fields in mounts if path.is_relative_to(fields[1])
    )
    return f"a {kind}" if kind in LOCAL_KINDS else None
