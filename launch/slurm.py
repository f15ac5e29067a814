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
from collections.abc import Sequence
from pathlib import Path

from hfscale.checks.start import refuse
from hfscale.config.schema import Cluster
from hfscale.dist.world import Allocation, allocation
from hfscale.errors import EXIT_DONE, ConfigError
from hfscale.log import logger
from hfscale.run_files import EXCLUDED, LOGS, RANK_LOG, SLURM_LOG
from launch import run_dir
from launch.attempt import code_folder, prepare
from launch.job import Job
from launch.queue import (
    client,
    has_slurm,
    hold,
    longest,
    queue_says,
    ranks_per_node,
    seconds,
)
from launch.request import quote
from launch.share import check_scripts, scripts_home
from launch.start import Start, before

SCRIPT = "slurm/train.sbatch"
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
    scripts_home(cluster)
    no_ranks(job)
    code = code_folder(job.folder)
    start = Submission(job, here=here, code=code)
    for line in refuse(start):
        logger.info(f"notice: {line}")
    if start.expected:
        logger.info(f"notice: {start.expected}")
    started = ["bash"] if here else ["sbatch", "--parsable", *sbatch_options(job, code)]
    command = [*started, SCRIPT, str(job.folder)]
    if job.dry_run:
        print(f"cd {quote(code)} && {shlex.join(command)}")
        return EXIT_DONE
    os.environ["HFSCALE_PYTHON"] = sys.executable
    with run_dir.locked(job.folder):
        prepare(job, launcher="slurm", procs=start.procs, code=code)
        if here is None:
            number = _submitted(job, command, code)
    if here:
        return watched(command, code)
    log = f"{job.folder / LOGS / SLURM_LOG.format(number)} and {RANK_LOG.format('*')}"
    nodes = f"{start.procs} ranks on {cluster.nodes} nodes"
    print(f"job {number}: {nodes}\n{followed(number, job, log=log)}")
    return EXIT_DONE


class Submission(Start):
    """The start of a job on nodes: of the allocation ``here``, or of one that Slurm is to give."""

    def __init__(self, job: Job | None, *, here: Allocation | None, code: Path = Path()) -> None:
        self.here, self.code = here, code
        if here:
            nodes, a_node, gpus = here.nodes, ranks_per_node(here), here.gpus_per_node
        else:
            cluster = job.cluster if job else Cluster()
            nodes, a_node, gpus = cluster.nodes, tasks_per_node(cluster), cluster.gpus_per_node or 0
        procs, slurm = nodes * a_node, queue_says(here)
        super().__init__(job, procs=procs, gpus=gpus > 0, nodes=nodes, slurm=slurm)

    def config(self) -> Sequence[str] | None:
        """Return notices on the config, cut for these nodes, and for the fewest that it allows."""
        job, cluster = self.job, self.job.cluster if self.job else Cluster()
        if job is None:
            return None
        if cluster.min_nodes:
            before(job, cluster.min_nodes * tasks_per_node(cluster), gpus=self.gpus)
        return before(job, self.procs, gpus=self.gpus)

    def allocation(self) -> Sequence[str] | None:
        """Return how the allocation differs from the config."""
        return differences(self.job.cluster, self.here) if self.job and self.here else None

    def scripts(self) -> Sequence[str] | None:
        """Return no notices if the shell can read what the job runs."""
        if self.job is not None:
            check_scripts(self.job.cluster)
        return [] if self.job else None

    def request(self) -> Sequence[str] | None:
        """Return what Slurm says of the job; when it would start is ``expected``."""
        if self.job is None or self.here:
            return None
        options, home = sbatch_options(self.job, self.code), scripts_home(self.job.cluster)
        lines = accepted(options, home=home, dry_run=self.job.dry_run)
        self.expected = next((line for line in lines if " to start at " in line), "")
        return [line for line in lines if line != self.expected]


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
