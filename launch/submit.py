"""Runs from Python, through submitit: ``submit`` for one, ``submit_sweep`` for a grid. Each returns
submitit's Job, or a list of them.

    job = submit("configs/pretrain/gpt2_small.yaml", ["run.name=mine"], nodes=2)
    job.results()[0]  # rank 0: {"done": True, "run_dir": ..., "step": ..., "loss": ..., ...}

``cluster="local"`` runs on this machine, ``"debug"`` in this process. What a job asks for comes
from ``cluster:`` of the config, then from ``cluster.submitit``, then from the call: names of
``submitit.AutoExecutor.update_parameters``.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import submitit
from submitit.helpers import TorchDistributedEnvironment
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from hfscale import worker
from hfscale.checks.start import refuse
from hfscale.dist.stop import SIGNALS
from hfscale.dist.world import Allocation, allocation
from hfscale.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from hfscale.log import logger
from hfscale.reports.status import last_record
from launch import run_dir
from launch.attempt import code_folder, prepare, take
from launch.job import Job, Training, open_job
from launch.queue import AGAIN_S, client, facts, has_slurm, hold, queue_says, requeue, seconds
from launch.request import Request, quote
from launch.share import check_scripts, scripts_home
from launch.slurm import followed, no_ranks, refusal, tasks_per_node
from launch.start import Start, before


class Rank:
    """What is pickled: no state, so that it can come from a notebook. Its argument is a path, and
    every rank calls it.
    """

    def __call__(self, config: str) -> dict[str, object]:
        """Return the last record of a run, with ``run_dir`` and whether it is ``done``. A stopped
        Slurm job goes back into the queue.
        """
        here, run = allocation(), Path(config).parent
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        environment = dict(os.environ)
        place = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        try:
            if here and place.rank == 0:
                take(open_job(str(run)), here)
            code = worker.run(Path(config), on_hang=lambda rank: _requeue(here))
        except BaseException:
            # once submitit has written what happened: the other ranks may wait in a collective for
            # ever
            atexit.register(os._exit, 1)
            raise
        finally:
            os.environ.clear()
            os.environ.update(environment)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if code == EXIT_STOPPED and here and _runs(here.job_id):  # a cancelled one would come back
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if place.rank == 0:
                _requeue(here)
            time.sleep(600)  # Slurm ends all ranks; one that returned would be taken for done
        return {**last_record(run), "run_dir": str(run), "done": code != EXIT_STOPPED}

    def checkpoint(self, config: str) -> submitit.helpers.DelayedSubmission:
        """Return what a job that is warned before training listens does next: the same again."""
        return submitit.helpers.DelayedSubmission(self, config)


def _requeue(here: Allocation | None) -> None:
    if here:
        requeue(here.job_id)


def _runs(job: str) -> bool:
    """Return whether Slurm says that a job runs; it is asked until it answers."""
    while (told := facts(job)) is None:
        logger.warning(f"Slurm does not answer what becomes of job {job}; asking again")
        time.sleep(AGAIN_S)
    return told.get("JobState") == "RUNNING"


class QueueWatcher(SlurmInfoWatcher):
    """States of jobs from squeue, for clusters without accounting: there submitit knows none, and
    waits for ever for a cancelled job.
    """

    def _make_command(self) -> list[str] | None:
        return (
            ["squeue", "-h", "-t", "all", "--me", "-o", "%i|%T|%N"]
            if super()._make_command()
            else None
        )

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        text = string if isinstance(string, str) else string.decode()
        # it ended some minutes ago
        forgotten = {job: {"State": "FORGOTTEN"} for job in self._registered}
        return forgotten | super().read_info("JobID|State|NodeList\n" + text)


def launch(job: Job) -> int:
    """Return 0 once submitit has submitted the job to Slurm: ``--launcher submitit``.

    Raises:
        UserError: as ``submit``.
    """
    no_ranks(job)
    if job.dry_run:
        parameters = _checked([job], "slurm", {})
        asked = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
        print(f"submitit.AutoExecutor(cluster='slurm').update_parameters({asked})")
    else:
        [submitted] = _submit([job], "slurm", {})
        print(followed(submitted.job_id, job, log=str(submitted.paths.stdout)))
    return EXIT_DONE


def submit(
    config: str, overrides: Sequence[str] = (), *, cluster: str = "slurm", **options: object
) -> submitit.Job[dict[str, object]]:
    """Return the job that trains ``config``; ``options`` are those of submitit.

    Raises:
        UserError: as the command line does, before anything is submitted.
    """
    return _submit([Training(Request(config, tuple(overrides)))], cluster, options)[0]


def submit_sweep(
    config: str,
    grid: Mapping[str, Sequence[object]],
    overrides: Sequence[str] = (),
    *,
    cluster: str = "slurm",
    **options: object,
) -> list[submitit.Job[dict[str, object]]]:
    """Return one job for each combination of ``grid`` (key -> values), as one array; each run's
    name ends in its values.
    """
    name = Request(config, tuple(overrides)).load().config.run.name
    requests = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        suffix = re.sub(
            r"[^\w.-]+",
            "_",
            "-".join(f"{key.rpartition('.')[2]}_{value}" for key, value in chosen.items()),
        )
        requests.append(
            Request(
                config,
                (
                    *overrides,
                    *(f"{key}={json.dumps(value)}" for key, value in chosen.items()),
                    f"run.name={name}-{suffix}",
                ),
            )
        )
    return _submit([*map(Training, requests)], cluster, options)


def _checked(jobs: Sequence[Job], cluster: str, options: Mapping[str, object]) -> dict[str, object]:
    """Return what submitit is told of ``jobs``, looked at before the first one writes."""
    if cluster == "slurm" and not has_slurm():
        raise ConfigError(
            "there is no Slurm on this machine",
            where="sbatch",
            remedy='submit from a login node, or with cluster="local"',
        )
    first = jobs[0]
    if cluster == "slurm":
        scripts_home(first.cluster)
    parameters = {**_parameters(first, cluster), **first.cluster.submitit, **options}
    starts = [SubmititStart(job, cluster, parameters) for job in jobs]
    notices = refuse(starts[0])
    for start in starts[1:]:  # they differ in values, not in parts or folders
        notices += start.config()
    for line in dict.fromkeys(notices):
        logger.info(f"notice: {line}")
    return parameters


class SubmititStart(Start):
    """The start of a job by submitit, which is told ``parameters``: on nodes, or here."""

    def __init__(self, job: Job, cluster: str, parameters: Mapping[str, object]) -> None:
        self.on_nodes = cluster == "slurm"
        procs, gpus = _ranks(parameters), bool(parameters.get("gpus_per_node"))
        nodes = int(str(parameters.get("nodes", 1)))
        if self.on_nodes:
            super().__init__(job, procs=procs, gpus=gpus, nodes=nodes, slurm=queue_says(None))
        else:
            super().__init__(job, procs=procs, gpus=gpus)

    def config(self) -> list[str]:
        """Return notices on the config."""
        assert self.job is not None
        return before(self.job, self.procs, gpus=self.gpus, on_nodes=self.on_nodes)

    def scripts(self) -> list[str] | None:
        """Return no notices if the shell can read what a job begins with."""
        if self.job is None or not self.on_nodes:
            return None
        check_scripts(self.job.cluster)
        return []


def _ranks(parameters: Mapping[str, object]) -> int:
    """Return how many ranks submitit starts."""
    nodes, ranks = (int(str(parameters.get(name, 1))) for name in ("nodes", "tasks_per_node"))
    return nodes * ranks


def _submit(
    jobs: Sequence[Job], cluster: str, options: Mapping[str, object]
) -> list[submitit.Job[dict[str, object]]]:
    parameters = _checked(jobs, cluster, options)
    first, procs = jobs[0], _ranks(parameters)
    code = code_folder(first.folder)
    for job in jobs:
        with run_dir.locked(job.folder):
            prepare(
                job,
                launcher=f"submitit {cluster}",
                procs=procs,
                code=code if job is first else None,
            )
    executor = submitit.AutoExecutor(
        folder=first.folder.parent / "submitit" / "%j", cluster=cluster
    )
    if cluster == "slurm":
        own = parameters.get("slurm_setup")
        parameters |= {
            "slurm_setup": [
                f"cd {quote(code)} || exit",
                "source slurm/start.sh",
                "set +euo pipefail",
                "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
                *(own if isinstance(own, list) else []),
            ]
        }
        if client(["sacct", "-n", "-X"]).returncode:
            SlurmJob.watcher = QueueWatcher(delay_s=30)
    executor.update_parameters(**parameters)
    try:
        submitted = executor.map_array(Rank(), [str(job.file) for job in jobs])
    except submitit.core.utils.FailedJobError as error:
        raise refusal(
            str(error), [f"{name}={value}" for name, value in parameters.items()]
        ) from error
    if cluster == "slurm":
        for job, one in zip(jobs, submitted, strict=True):
            hold(job.folder, one.job_id)
    return submitted


def _parameters(job: Job, cluster: str) -> dict[str, object]:
    """Return what the job's ``cluster:`` is in submitit's words."""
    asked = job.cluster
    shared = {
        "name": job.name,
        "tasks_per_node": 1 if cluster == "debug" else tasks_per_node(asked),
        "gpus_per_node": asked.gpus_per_node or None,
        "timeout_min": seconds(asked.time or "60") // 60,
    }
    if cluster != "slurm":
        return shared
    more = {
        "requeue": True,
        **{name: value for name, value in asked.sbatch.items() if name != "ntasks-per-node"},
    }
    return shared | {
        "nodes": asked.nodes,
        "slurm_partition": asked.partition,
        "slurm_account": asked.account,
        "slurm_signal_delay_s": asked.signal_s,
        "slurm_additional_parameters": more,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
    }
