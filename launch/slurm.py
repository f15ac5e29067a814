"""The Slurm launcher: makes the run directory, hands slurm/train.sbatch to sbatch, and tells how to
follow the job.

What the script does beside srun is in ``launch/job.py``. Inside an allocation the launcher runs it
right there instead of submitting it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfscale.config.load import Loaded
from hfscale.config.rules import notices, solve_batch
from hfscale.config.schema import Cluster, TrainConfig
from hfscale.dist.world import Allocation, allocation
from hfscale.errors import EXIT_DONE, ConfigError
from hfscale.hub import local_folder
from hfscale.log import logger
from hfscale.reports.status import last_record
from hfscale.run_files import CODE, EXCLUDED, LOGS, RANK_LOG, SLURM_LOG, TENSORBOARD
from launch import run_dir
from launch.queue import client, has_slurm, hold, longest, ranks_per_node, seconds
from launch.request import Request, check, quote, refuse_copies
from launch.share import ROOT, scripts_home

SCRIPT = "slurm/train.sbatch"
PACKAGES = ("hfscale", "launch")  # what a job's snapshot of the code has beside slurm/
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run", tempfile.gettempdir())
LOCAL_KINDS = ("tmpfs", "ramfs", "devtmpfs", "squashfs")
REFUSED = {
    "no-kill": "a job that lost a node would go on and end as if all was well",
    "array": "every task would be the same run; launch.submit has sweeps",
    "chdir": "a job runs in its snapshot of the code",
}


def launch(request: Request) -> int:
    """Return 0 once the job is submitted; inside an allocation, the exit code of the run.

    Raises:
        UserError: for everything that can be known before the job starts, and what Slurm refuses.
            Nothing is submitted then.
    """
    refuse_copies()
    loaded, here = request.load(), allocation()
    config = loaded.config
    scripts_home(config.cluster)
    run, cluster = config.run_dir, config.cluster
    no_ranks(request)
    procs = here.nodes * ranks_per_node(here) if here else cluster.nodes * tasks_per_node(cluster)
    if cluster.min_nodes:
        before(
            config, cluster.min_nodes * tasks_per_node(cluster), gpus=bool(cluster.gpus_per_node)
        )
    said = before(config, procs, gpus=bool(here.gpus_per_node if here else cluster.gpus_per_node))
    code = code_folder(run)
    options = [] if here else sbatch_options(config, code)
    command = (
        ["bash", SCRIPT, str(run)] if here else ["sbatch", "--parsable", *options, SCRIPT, str(run)]
    )
    if here:
        said += differences(cluster, here)
    else:
        said += accepted(options, home=scripts_home(cluster), dry_run=request.dry_run)
    from hfscale.jobs.check import check as check_parts  # slow to import

    check_parts(config)
    for line in said:
        logger.info(f"notice: {line}")
    if request.dry_run:
        print(f"cd {quote(code)} && {shlex.join(command)}")
        return EXIT_DONE
    os.environ["HFSCALE_PYTHON"] = sys.executable
    with run_dir.locked(run):
        prepare(loaded, launcher="slurm", procs=procs, code=code)
        if here is None:
            done = client(command, cwd=code)
            if done.returncode:
                raise refusal(done.stderr, options)
            job = done.stdout.strip().partition(";")[0]
            hold(run, job)
    if here:
        return watched(command, code)
    log = f"{run / LOGS / SLURM_LOG.format(job)} and {RANK_LOG.format('*')}"
    nodes = f"{procs} ranks on {cluster.nodes} nodes"
    print(f"job {job}: {nodes}\n{followed(job, config, log=log)}")
    return EXIT_DONE


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


def no_ranks(request: Request) -> None:
    """Return if nothing was asked for that a job has from its cluster.

    Raises:
        ConfigError: if it was.
    """
    if request.procs or request.port:
        raise ConfigError(
            "a Slurm job has its ranks and its port from the cluster",
            where="--procs, --port",
            remedy="say cluster.nodes=N cluster.gpus_per_node=M (without GPUs: "
            "cluster.sbatch.ntasks-per-node=M)",
        )


def followed(job: str, config: TrainConfig, *, log: str) -> str:
    """Return how to follow a job that was submitted."""
    run = quote(config.run_dir)
    return (
        f"run directory {run}\nlogs          {log}\n"
        f"follow it     hfscale logs {run} -f\nwhere it is   hfscale status {run}\n"
        f"stop it       scancel {job}; hfscale {config.verb} {run} --launcher slurm goes on\n"
        f"curves        tensorboard --logdir {quote(config.run_dir / TENSORBOARD)}"
    )


def tasks_per_node(cluster: Cluster) -> int:
    return int(cluster.sbatch.get("ntasks-per-node") or cluster.gpus_per_node or 1)


def before(
    config: TrainConfig,
    procs: int,
    *,
    gpus: bool,
    on_nodes: bool = True,
    limit: str | None = None,
) -> list[str]:
    """Return notices on a run of ``procs`` ranks, after looking at all that can be known without
    asking Slurm or importing torch.

    ``limit`` is the time limit of the job around this, as Slurm writes it, where it is known.

    Raises:
        UserError: for the first thing that speaks against it.
    """
    solve_batch(config.train.global_batch, micro_batch=config.train.micro_batch, data_size=procs)
    changed = run_dir.compare(config)
    check(config, device_type="cuda" if gpus else "cpu")
    if on_nodes:
        _refuse_local_disk(config)
    if config.model.pretrained:  # into the cache, where the nodes find it: they have no network
        local_folder(config.model.pretrained, where="model.pretrained", weights=True)
    return [*notices(config), *changed, *(_time_to_save(config, limit) if on_nodes else ())]


def prepare(
    loaded: Loaded[TrainConfig], *, launcher: str, procs: int, code: Path | None = None
) -> None:
    """Return when the run directory has the config, this attempt's entry, a folder for logs, and in
    ``code`` a snapshot of the code.

    Raises:
        ConfigError: if no log can be written there.
    """
    run_dir.record(loaded, launcher=launcher, procs=procs)
    if code:
        scripts = scripts_home(loaded.config.cluster) / "slurm"
        for folder in (*(ROOT / name for name in PACKAGES), scripts):
            shutil.copytree(
                folder,
                code / folder.name,
                ignore=shutil.ignore_patterns("__pycache__"),
                dirs_exist_ok=True,
            )
    logs = loaded.config.run_dir / LOGS
    try:
        logs.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=logs).close()
    except OSError as error:
        raise ConfigError(
            f"no log can be written here: {error.strerror}",
            where=logs,
            remedy="mend the folder: Slurm would end the job without a word",
        ) from None


def code_folder(run: Path) -> Path:
    """Return where a job's snapshot of the code lies: it runs what was submitted, whatever becomes
    of the checkout.
    """
    return run / CODE / str(len(run_dir.attempts(run)) + 1)


def sbatch_options(config: TrainConfig, code: Path) -> list[str]:
    """Return the options of sbatch that ``cluster:`` stands for."""
    cluster = config.cluster
    for name in cluster.sbatch:
        if name in REFUSED:
            raise ConfigError(
                f"--{name} is not for training: {REFUSED[name]}",
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
    values: dict[str, Any] = {
        "job-name": config.run.name,
        "chdir": code,
        "output": config.run_dir / LOGS / SLURM_LOG.format("%j"),
        "nodes": f"{cluster.min_nodes}-{cluster.nodes}" if cluster.min_nodes else cluster.nodes,
        "gpus-per-node": cluster.gpus_per_node or None,
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
        "signal": f"USR1@{cluster.signal_s}",
        **cluster.sbatch,
    }
    left_out = [
        str(name) for name in (cluster.sbatch.get("exclude"), *excluded(config.run_dir)) if name
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
    limit, said = (
        longest(asked.get("partition")),
        [line for line in tried.stderr.splitlines() if " to start at " in line],
    )
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
        remedy=f"this cluster has {offers}",
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


def _time_to_save(config: TrainConfig, limit: str | None = None) -> list[str]:
    """Return a notice if saves were seen to take longer than the time between Slurm's signal and
    the end.

    ``limit`` is that of the job; without it, what the config asks for.

    Raises:
        ConfigError: if the time limit leaves no time to train.
    """
    cluster, record = config.cluster, last_record(config.run_dir)
    needed = record.get("save_s", 0.0) + record.get("step_s", 0.0)
    limit = limit or cluster.time
    if limit and limit[0].isdigit() and seconds(limit) <= max(cluster.signal_s, needed):
        why = (
            f"step and save take {needed:.0f} s, and the ranks are told to save "
            f"{cluster.signal_s} s (cluster.signal_s) before the end"
        )
        raise ConfigError(
            f"the time limit leaves no time to train: {why}",
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


def _refuse_local_disk(config: TrainConfig) -> None:
    """Return if run directory and hub cache are, as far as one can see, on a disk that every node
    sees.

    Raises:
        ConfigError: naming the one that is not.
    """
    places = {"run.root": config.run_dir}
    names = (config.tokenizer and config.tokenizer.path, config.model.pretrained)
    if any(name and not Path(name).is_absolute() for name in names):  # from the hub
        places["HF_HOME"] = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for where, path in places.items():
        if not config.cluster.allow_local_disk and (kind := local_kind(path)):
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
