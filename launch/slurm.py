"""The Slurm launcher: makes the run directory, hands slurm/train.sbatch to sbatch, and tells how to
follow the job.

What the script does beside srun is in ``launch/script.py``. Inside an allocation the launcher runs
it right there instead of submitting it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hfscale.config.schema import Cluster
from hfscale.dist.world import Allocation, allocation
from hfscale.errors import EXIT_DONE, ConfigError
from hfscale.log import logger
from hfscale.run_files import EXCLUDED, LOGS, RANK_LOG, SLURM_LOG
from launch import run_dir
from launch.attempt import code_folder, prepare
from launch.job import Job
from launch.queue import client, has_slurm, hold, longest, ranks_per_node, seconds
from launch.request import quote
from launch.share import scripts_home

SCRIPT = "slurm/train.sbatch"
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run", tempfile.gettempdir())
LOCAL_KINDS = ("tmpfs", "ramfs", "devtmpfs", "squashfs")
REFUSED = {
    "no-kill": "a job that lost a node would go on and end as if all was well",
    "array": "every task would be the same run; launch.submit has sweeps",
    "chdir": "a job runs in its snapshot of the code",
}


def launch(job: Job) -> int:
    """Return 0 once the job is submitted; inside an allocation, the exit code of its ranks.

    Raises:
        UserError: for everything that can be known before the job starts, and what Slurm refuses.
            Nothing is submitted then.
    """
    here, cluster = allocation(), job.cluster
    home = scripts_home(cluster)
    no_ranks(job)
    procs = here.nodes * ranks_per_node(here) if here else cluster.nodes * tasks_per_node(cluster)
    if cluster.min_nodes:
        before(job, cluster.min_nodes * tasks_per_node(cluster), gpus=bool(cluster.gpus_per_node))
    said = before(job, procs, gpus=bool(here.gpus_per_node if here else cluster.gpus_per_node))
    code = code_folder(job.folder)
    options = [] if here else sbatch_options(job, code)
    started = ["bash"] if here else ["sbatch", "--parsable", *options]
    command = [*started, SCRIPT, str(job.folder)]
    if here:
        said += differences(cluster, here)
    else:
        said += accepted(options, home=home, dry_run=job.dry_run)
    job.check_parts()
    for line in said:
        logger.info(f"notice: {line}")
    if job.dry_run:
        print(f"cd {quote(code)} && {shlex.join(command)}")
        return EXIT_DONE
    os.environ["HFSCALE_PYTHON"] = sys.executable
    with run_dir.locked(job.folder):
        prepare(job, launcher="slurm", procs=procs, code=code)
        if here is None:
            number = _submitted(job, command, code)
    if here:
        return watched(command, code)
    log = f"{job.folder / LOGS / SLURM_LOG.format(number)} and {RANK_LOG.format('*')}"
    nodes = f"{procs} ranks on {cluster.nodes} nodes"
    print(f"job {number}: {nodes}\n{followed(number, job, log=log)}")
    return EXIT_DONE


def _submitted(job: Job, command: Sequence[str], code: Path) -> str:
    """Return the number of the job in the queue, which now holds the folder.

    Raises:
        ConfigError: if Slurm refuses it.
    """
    done = client(command, cwd=code)
    if done.returncode:
        raise refusal(done.stderr, command[2:-2])
    number = done.stdout.strip().partition(";")[0]
    hold(job.folder, number)
    return number


def watched(command: Sequence[str], folder: Path) -> int:
    """Return the exit code of slurm/train.sbatch in this allocation. It hears Ctrl-C itself; what
    ends this process goes on to it.
    """
    with subprocess.Popen(command, cwd=folder) as script:
        before = {
            number: signal.signal(number, lambda *_: script.terminate())
            for number in (signal.SIGTERM, signal.SIGHUP)
        } | {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
        try:
            return script.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def no_ranks(job: Job) -> None:
    """Return if nothing was asked for that a job has from its cluster.

    Raises:
        ConfigError: if it was.
    """
    if job.procs or job.port:
        raise ConfigError(
            "a Slurm job has its ranks and its port from the cluster",
            where="--procs, --port",
            remedy="say cluster.nodes=N cluster.gpus_per_node=M (without GPUs: "
            "cluster.sbatch.ntasks-per-node=M)",
        )


def followed(number: str, job: Job, *, log: str) -> str:
    """Return how to follow a job that was submitted."""
    folder = quote(job.folder)
    lines = [
        *((name, quote(path)) for name, path in job.results()),
        ("logs", log),
        ("follow it", f"hfscale logs {folder} -f"),
        ("where it is", f"hfscale status {folder}"),
        ("stop it", f"scancel {number}; {job.goes_on('--launcher slurm')} goes on"),
    ]
    if job.curves:
        lines.append(("curves", job.curves))
    return "\n".join(f"{name:<13} {value}" for name, value in lines)


def tasks_per_node(cluster: Cluster) -> int:
    asked = cluster.sbatch.get("ntasks-per-node")
    return int(str(asked)) if asked else cluster.gpus_per_node or 1


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
    return [*said, *(_time_to_save(job, limit) if on_nodes else ())]


def sbatch_options(job: Job, code: Path) -> list[str]:
    """Return the options of sbatch that ``cluster:`` stands for."""
    cluster = job.cluster
    for name in cluster.sbatch:
        if name in REFUSED:
            raise ConfigError(
                f"--{name} is not for {job.does.removesuffix('e')}ing: {REFUSED[name]}",
                where=f"cluster.sbatch.{name}",
                remedy="take it out",
            )
    if cluster.min_nodes and cluster.sbatch.get("ntasks-per-node"):
        raise ConfigError(
            "with a number of tasks Slurm gives a job the fewest nodes at once",
            where="cluster.min_nodes",
            value=cluster.min_nodes,
            remedy="take cluster.sbatch.ntasks-per-node out: cluster.gpus_per_node says it",
        )
    values: dict[str, object] = {
        "job-name": job.name,
        "chdir": code,
        "output": job.folder / LOGS / SLURM_LOG.format("%j"),
        "nodes": f"{cluster.min_nodes}-{cluster.nodes}" if cluster.min_nodes else cluster.nodes,
        "gpus-per-node": cluster.gpus_per_node or None,
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
        "signal": f"USR1@{cluster.signal_s}",
        **cluster.sbatch,
    }
    left_out = [
        str(name) for name in (cluster.sbatch.get("exclude"), *excluded(job.folder)) if name
    ]
    values["exclude"] = ",".join(left_out) or None
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in values.items()
        if value not in (None, False)
    ]


def excluded(run: Path) -> list[str]:
    """Return the nodes that jobs of this run leave out: the first word of each line of a file that
    people may edit.
    """
    file = run / EXCLUDED
    return (
        [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        if file.is_file()
        else []
    )


def accepted(options: Sequence[str], *, home: Path, dry_run: bool) -> list[str]:
    """Return what Slurm says of a job with these options, of the scripts in ``home``, without
    submitting it.

    Raises:
        ConfigError: in Slurm's own words, if it refuses.
    """
    if not has_slurm():
        if dry_run:
            return [
                "there is no Slurm on this machine, so nobody was asked about partition and limits"
            ]
        raise ConfigError(
            "there is no Slurm on this machine",
            where="sbatch",
            remedy="go to a login node, or take --launcher local",
        )
    tried = client(
        [
            "sbatch",
            "--test-only",
            *(option for option in options if not option.startswith("--chdir")),
            SCRIPT,
        ],
        cwd=home,
    )
    if tried.returncode:
        raise refusal(tried.stderr, options)
    asked = dict(option[2:].split("=", 1) for option in options if "=" in option)
    limit = longest(asked.get("partition"))
    said = [line for line in tried.stderr.splitlines() if " to start at " in line]
    if limit[0].isdigit() and seconds(asked.get("time", "0")) > seconds(limit):
        said = [
            f"a partition with a limit of {limit} never starts a job of {asked['time']}, "
            "though Slurm takes it"
        ]
    return [line.removeprefix("sbatch: ") for line in said]


def refusal(stderr: str, options: Sequence[str]) -> ConfigError:
    """Return Slurm's refusal of a job with these options, in its own words, with what the cluster
    has.
    """
    words = "; ".join(
        line.removeprefix("sbatch: ").removeprefix("error: ")
        for line in stderr.splitlines()
        if line.strip()
    )
    offers = "; ".join(
        client(["sinfo", "-h", "-o", "%P (%D nodes with %G, up to %l)"]).stdout.splitlines()
    )
    asked = " ".join(option for option in options if not option.startswith(("--chdir", "--output")))
    return ConfigError(
        f"Slurm refuses the job: {words}",
        where="cluster",
        value=asked,
        remedy=f"this cluster has {offers}"
        if offers
        else "see whether its controller is up: sinfo",
    )


def differences(cluster: Cluster, here: Allocation) -> list[str]:
    """Return how an allocation differs from what the config asks for: the allocation wins."""
    pairs = {
        "nodes": (cluster.nodes, here.nodes),
        "gpus_per_node": (cluster.gpus_per_node or 0, here.gpus_per_node),
    }
    return [
        f"the allocation has {name} {has}, not the {asked} of cluster.{name}"
        for name, (asked, has) in pairs.items()
        if asked != has
    ]


def _time_to_save(job: Job, limit: str | None = None) -> list[str]:
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
