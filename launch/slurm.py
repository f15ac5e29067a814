"""The Slurm launcher: makes the run directory, hands slurm/train.sbatch to sbatch, and tells how to follow the job.

The job itself begins with ``python -m launch.slurm RANKS CONFIG_OR_RUN [key=value ...]``, which prepares its run directory on the
first node. Inside an allocation the launcher runs the script right there instead of submitting it.
"""
from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfscale import log
from hfscale.config.rules import notices, solve_batch
from hfscale.config.schema import Cluster, RunConfig
from hfscale.dist.world import Allocation, allocation
from hfscale.errors import EXIT_DONE, EXIT_USER_ERROR, ConfigError, UserError
from hfscale.hub import local_folder
from hfscale.log import logger
from hfscale.reports.status import last_record
from launch import run_dir
from launch.queue import client, has_slurm, hold, partitions, refuse_too_many_restarts, seconds
from launch.request import Request, check, check_parts

SCRIPT = "slurm/train.sbatch"
CODE = "code"  # in a run directory: what its jobs run, a folder a state of the code
SHIPPED = {"hfscale": "*.py", "launch": "*.py", "slurm": "*"}  # the parts of the checkout that a job needs
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
LOCAL_KINDS = ("tmpfs", "ramfs", "devtmpfs", "squashfs")
REFUSED = {"no-kill": "a job that lost a node would go on and end as if all was well",
           "array": "every task would be the same run; launch.submit has sweeps", "chdir": "a job runs in its snapshot of the code"}


def launch(request: Request) -> int:
    """Return 0 once the job is submitted; inside an allocation, the exit code of the run.

    Raises:
        UserError: for everything that can be known before the job starts, and what Slurm refuses. Nothing is submitted then.
    """
    log.setup()
    loaded = request.load()
    config, here = loaded.config, allocation()
    cluster = config.cluster
    if request.procs or request.port:
        raise ConfigError("a Slurm job has its ranks and its port from the cluster", where="--procs, --port",
                          remedy="say cluster.nodes=N cluster.gpus_per_node=M (without GPUs: cluster.sbatch.ntasks-per-node=M)")
    procs = here.nodes * here.tasks_per_node if here else cluster.nodes * _tasks_per_node(cluster)
    said = [*before(config, procs, gpus=bool(here.gpus_per_node if here else cluster.gpus_per_node)), *_differences(cluster, here)]
    run, code = config.run_dir, config.run_dir / CODE / code_digest()
    options = [] if here else sbatch_options(config, code)
    command = ["bash", SCRIPT, str(run)] if here else ["sbatch", "--parsable", *options, SCRIPT, str(run)]
    if not here:
        said += _accepted(options, dry_run=request.dry_run)
    check_parts(config)
    fetch(config)
    for line in said:
        logger.info(f"notice: {line}")
    if request.dry_run:
        print(f"cd {shlex.quote(str(code))} && {shlex.join(command)}")
        return EXIT_DONE
    with run_dir.locked(run):
        run_dir.compare(config)  # again, under the lock
        run_dir.record(loaded, launcher="slurm", procs=procs)
        snapshot(code)
        _make_logs(run)
        environment = os.environ | {"HFSCALE_PYTHON": sys.executable}
        if here is None:
            done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise _refusal(done.stderr, options)
            job = done.stdout.strip().partition(";")[0]
            hold(run, job)
    if here:
        return subprocess.run(command, cwd=code, env=environment, check=False).returncode
    print(f"job {job}: {procs} ranks on {cluster.nodes} nodes\n"
          f"run directory {run}\nlogs          {run / 'logs'}/slurm-{job}.log and rank-*.log\n"
          f"follow it     hfscale logs {run} -f\n"
          f"where it is   hfscale status {run}\n"
          f"stop it       scancel {job}; hfscale pretrain {run} --launcher slurm goes on\n"
          f"curves        tensorboard --logdir {run / 'tensorboard'}")
    return EXIT_DONE


def fetch(config: RunConfig) -> None:
    """Return when the hub's weights are in the cache (a tokenizer was fetched when the parts were checked): the nodes have no network."""
    if config.model.pretrained:
        local_folder(config.model.pretrained, where="model.pretrained", weights=True)


def _tasks_per_node(cluster: Cluster) -> int:
    return int(cluster.sbatch.get("ntasks-per-node") or cluster.gpus_per_node or 1)


def before(config: RunConfig, procs: int, *, gpus: bool, on_nodes: bool = True) -> list[str]:
    """Return notices on a run of ``procs`` ranks, after looking at all that can be known without asking Slurm or importing torch.

    Raises:
        UserError: for the first thing that speaks against it.
    """
    solve_batch(config.train.global_batch, micro_batch=config.train.micro_batch, world_size=procs)
    check(config, device_type="cuda" if gpus else "cpu")
    if on_nodes:
        _refuse_local_disk(config)
    return [*notices(config), *run_dir.compare(config), *(_time_to_save(config) if on_nodes else ())]


def sbatch_options(config: RunConfig, code: Path) -> list[str]:
    """Return the options of sbatch that ``cluster:`` stands for."""
    cluster = config.cluster
    for name in cluster.sbatch:
        if name in REFUSED:
            raise ConfigError(f"--{name} is not for training: {REFUSED[name]}", where=f"cluster.sbatch.{name}", remedy="take it out")
    values: dict[str, Any] = {
        "job-name": config.run.name, "chdir": code, "output": config.run_dir / "logs" / "slurm-%j.log", "nodes": cluster.nodes,
        "gpus-per-node": cluster.gpus_per_node or None, "partition": cluster.partition, "account": cluster.account,
        "time": cluster.time, "signal": f"USR1@{cluster.signal_s}", **cluster.sbatch}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items() if value not in (None, False)]


def _accepted(options: Sequence[str], *, dry_run: bool) -> list[str]:
    """Return what Slurm says of a job with these options, without submitting it.

    Raises:
        ConfigError: in Slurm's own words, if it refuses.
    """
    if not has_slurm():
        if dry_run:
            return ["there is no Slurm on this machine, so nobody was asked about partition and limits"]
        raise ConfigError("there is no Slurm on this machine", where="sbatch", remedy="run this on a login node of the cluster, "
                          "or train on this machine with --launcher local")
    tried = client(["sbatch", "--test-only", *(option for option in options if not option.startswith("--chdir")), _root() / SCRIPT])
    if tried.returncode:
        raise _refusal(tried.stderr, options)
    asked = dict(option[2:].partition("=")[::2] for option in options)
    for name, (words, limit) in partitions().items():
        mine = asked.get("partition") in (name.rstrip("*"), None if name.endswith("*") else name)
        if mine and (seconds(asked.get("time")) or 0) > (seconds(limit) or float("inf")):
            raise ConfigError("the time limit is above the partition's: the job would wait for ever", where="cluster.time",
                              value=asked["time"], remedy=f"ask for less, or for another partition; this is {words}")
    return [line.removeprefix("sbatch: ") for line in tried.stderr.splitlines() if " to start at " in line]


def _refusal(stderr: str, options: Sequence[str]) -> ConfigError:
    words = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in stderr.splitlines() if line.strip())
    there = "; ".join(offer for offer, _ in partitions().values())
    return ConfigError(f"Slurm refuses the job: {words}", where="cluster",
                       value=" ".join(option for option in options if not option.startswith(("--chdir", "--output"))),
                       remedy=f"this cluster has {there}" if there else "see sinfo")


def _differences(cluster: Cluster, here: Allocation | None) -> list[str]:
    """Return how an allocation differs from what the config asks for: the allocation wins."""
    if here is None:
        return []
    pairs = {"nodes": (cluster.nodes, here.nodes), "gpus_per_node": (cluster.gpus_per_node or 0, here.gpus_per_node)}
    return [f"the allocation has {name} {has}, not the {asked} of cluster.{name}" for name, (asked, has) in pairs.items() if asked != has]


def _time_to_save(config: RunConfig) -> list[str]:
    """Return a notice if saves were seen to take longer than the time between Slurm's signal and the end.

    Raises:
        ConfigError: if the time limit leaves no time to train.
    """
    cluster, record = config.cluster, last_record(config.run_dir)
    needed = record.get("save_s", 0.0) + record.get("step_s", 0.0)
    limit = seconds(cluster.time)
    if limit is not None and limit <= max(cluster.signal_s, needed):
        why = f"step and save take {needed:.0f} s, and the ranks are told to save {cluster.signal_s} s (cluster.signal_s) before the end"
        raise ConfigError(f"the time limit leaves no time to train: {why}", where="cluster.time", value=cluster.time, remedy="ask for more")
    if needed > cluster.signal_s:
        return [f"step and save took {needed:.0f} s, Slurm warns {cluster.signal_s} s ahead: better cluster.signal_s={2 * needed:.0f}"]
    return []


def _refuse_local_disk(config: RunConfig) -> None:
    """Return if run directory and hub cache are, as far as one can see, on a disk that every node sees.

    Raises:
        ConfigError: naming the one that is not.
    """
    from_hub = [name for name in (config.tokenizer.path, config.model.pretrained) if name and not Path(name).is_absolute()]
    places = {"run.root": config.run_dir}
    if from_hub:
        places["HF_HOME"] = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for where, path in places.items():
        if not config.cluster.allow_local_disk and (kind := local_kind(path)):
            raise ConfigError(f"this folder is on {kind}, which other nodes do not see", where=where, value=str(path),
                              remedy="choose one on a shared file system, or cluster.allow_local_disk=true if it is one")


def local_kind(path: Path) -> str | None:
    """Return what kind of place of this node alone ``path`` is in; None where it seems shared."""
    path = Path(os.path.realpath(path))
    if found := [folder for folder in (*LOCAL_FOLDERS, os.path.realpath(tempfile.gettempdir())) if path.is_relative_to(folder)]:
        return found[0]
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()] if Path("/proc/mounts").exists() else []
    above = [(len(fields[1]), fields[2]) for fields in mounts if path.is_relative_to(fields[1])]
    kind = max(above)[1] if above else ""
    return f"a {kind}" if kind in LOCAL_KINDS else None


# ---------------------------------------------------------------------------------------------- code snapshot
def _root() -> Path:
    """Return the checkout that this module is part of.

    Raises:
        ConfigError: if it was installed without slurm/.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / SCRIPT).is_file():
        raise ConfigError(f"there is no {SCRIPT} beside this installation", where=root, remedy="install the checkout: pip install -e .")
    return root


def _shipped() -> list[Path]:
    root = _root()
    return sorted(file for folder, pattern in SHIPPED.items() for file in (root / folder).rglob(pattern) if file.is_file())


def code_digest() -> str:
    """Return a name for the state of the code."""
    digest = hashlib.sha256()
    for file in _shipped():
        digest.update(f"{file.relative_to(_root())}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def snapshot(target: Path) -> None:
    """Copy the code to ``target``, so that a job runs what was submitted, whatever becomes of the checkout."""
    if target.is_dir():
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for file in _shipped():
        copy = partial / file.relative_to(_root())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy)
    partial.rename(target)


def _make_logs(run: Path) -> None:
    try:
        (run / "logs").mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=run / "logs"):
            return
    except OSError as error:
        raise ConfigError(f"no log can be written here: {error.strerror}", where=run / "logs",
                          remedy="mend the folder: Slurm would end the job without a word") from None


# -------------------------------------------------------------------------------------------- inside the job
def begin(source: str, overrides: Sequence[str], *, procs: int) -> Path:
    """Return the run directory of the job around this process, made or found, checked, and held by the job.

    Raises:
        UserError: as ``launch``; and if another job holds it, or this one was restarted too often.
    """
    here = allocation()
    if here is None:
        raise ConfigError("this is not a Slurm job", where=SCRIPT, remedy=f"submit it: sbatch --nodes=N {SCRIPT} CONFIG")
    loaded = Request(source, tuple(overrides)).load()
    config = loaded.config
    refuse_too_many_restarts(here, config)
    for line in before(config, procs, gpus=here.gpus_per_node > 0):
        logger.info(f"notice: {line}")
    with run_dir.locked(config.run_dir):
        hold(config.run_dir, here.job_id)
        run_dir.compare(config)
        run_dir.record(loaded, launcher="slurm", procs=procs)
        _make_logs(config.run_dir)
        (config.run_dir / "exit_code").unlink(missing_ok=True)
    logger.info(f"job {here.job_id}, restart {here.restarts}: {procs} ranks on {here.node_list}; logs: {config.run_dir / 'logs'}")
    return config.run_dir


def main() -> int:
    """Return the exit code of the job's first act; its run directory is what is printed."""
    log.setup()
    try:
        print(begin(sys.argv[2], sys.argv[3:], procs=int(sys.argv[1])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
