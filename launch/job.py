"""What a Slurm job does beside training: slurm/train.sbatch calls this before its srun and after it, on the first node.

python -m launch.job begin NODES TASKS CONFIG_OR_RUN [key=value ...]    prints how many NODES to use, a port, the run directory
python -m launch.job end CODE RUN                                       prints what the shell does next, in the shell's words
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfscale import log
from hfscale.checkpoint import layout
from hfscale.config.schema import TrainConfig
from hfscale.dist.world import Allocation, allocation, job_port
from hfscale.errors import EXIT_HUNG, EXIT_STOPPED, ConfigError, exit_code
from hfscale.log import logger
from hfscale.monitor.heartbeat import HANGS, REPORT
from hfscale.records import Count, Record, load
from hfscale.shards.files import write_atomically
from hfscale.worker import EXIT_CODE, JOB
from launch import run_dir
from launch.queue import hold
from launch.request import Request
from launch.slurm import EXCLUDED, SCRIPT, before, excluded, prepare, sbatch_options

TWICE = 2  # hangs of a node, after which the run leaves it out
TAIL_LINES = 20
AGAIN = {
    EXIT_STOPPED: "stopped and saved",
    EXIT_HUNG: "ranks hung, or lost one another",
}  # after which a job is requeued


class _Start(Record):
    """From which checkpoint a job began, and how often in a row."""

    job: str
    checkpoint: str | None
    restarts: Count


class _Beat(Record):
    node: str


class _Hang(Record):
    """What ``monitor/heartbeat.py`` reports of a hang, as far as it is read here."""

    verdict: str
    odd: list[_Beat]


def begin(
    source: str, overrides: Sequence[str], *, nodes: int, tasks: int
) -> tuple[int, int, Path]:
    """Return how many of the allocation's ``nodes`` to use, with ``tasks`` ranks on each, the port of their rendezvous, free on the first,
    where this runs, and the run directory: made or found, held.

    Raises:
        UserError: as ``launch.slurm.launch``; and if another job holds it, or this one restarts again and again.
    """
    here = allocation()
    if here is None:
        raise ConfigError(
            "this is not a Slurm job",
            where=SCRIPT,
            remedy=f"submit it: sbatch --nodes=N {SCRIPT} CONFIG",
        )
    loaded = Request(source, tuple(overrides)).load()
    config = loaded.config
    usable = usable_nodes(config, nodes, tasks)
    for line in before(config, usable * tasks, gpus=here.gpus_per_node > 0):
        logger.info(f"notice: {line}")
    with run_dir.locked(config.run_dir):
        take(config, here)
        prepare(loaded, launcher="slurm", procs=usable * tasks)
        (config.run_dir / EXIT_CODE).unlink(missing_ok=True)
    idle = f" ({nodes - usable} stay idle: the batch does not divide)" if usable < nodes else ""
    logger.info(
        f"job {here.job_id}, restart {here.restarts}: {usable * tasks} ranks on {usable} of the nodes {here.node_list}{idle}; "
        f"logs: {config.run_dir / 'logs'}"
    )
    return usable, job_port(here.job_id), config.run_dir


def usable_nodes(config: TrainConfig, nodes: int, tasks: int) -> int:
    """Return the most of ``nodes`` among which the global batch divides; all of them where ``cluster.min_nodes`` asks for no fewer."""
    train, fewest = config.train, config.cluster.min_nodes or nodes
    fits = (
        count
        for count in range(nodes, fewest - 1, -1)
        if train.global_batch % (train.micro_batch * tasks * count) == 0
    )
    return next(fits, nodes)


def take(config: TrainConfig, here: Allocation) -> None:
    """Return if the job ``here`` now holds the run directory.

    Raises:
        UserError: if another one does, or this one was restarted too often without coming further.
    """
    hold(config.run_dir, here.job_id)
    saved = layout.committed(config.run_dir / layout.FOLDER)
    start = {"job": here.job_id, "checkpoint": saved[-1].name if saved else None}
    file = config.run_dir / run_dir.RESTARTS
    last = load(file, _Start, what="the record of restarts").as_dict() if file.is_file() else {}
    restarts = last["restarts"] + 1 if last.items() >= start.items() else 0
    if restarts > config.cluster.max_restarts:
        raise ConfigError(
            f"job {here.job_id} was restarted {restarts} times without getting beyond {start['checkpoint'] or 'its start'}",
            where="cluster.max_restarts",
            value=config.cluster.max_restarts,
            remedy="see why in the logs; then submit it again, or raise the limit",
        )
    write_atomically(file, json.dumps({**start, "restarts": restarts}).encode())


def end(run: Path, code: int) -> tuple[int, str]:
    """Return the job's exit code and the shell command by which the run goes on ("" if it should not); why is said on stderr.

    srun reports the ranks that it killed: ``code`` is theirs. The first one that left by itself has left its code and its number.
    """
    here, file = allocation(), run / EXIT_CODE
    assert here is not None
    left = file.read_text().split() if file.is_file() else []
    reports = [
        load(file, _Hang, what="the report of a hang").as_dict()
        for file in sorted(
            (run / HANGS).glob(f"*/{REPORT}"), key=lambda file: int(file.parent.name)
        )
    ]
    if left:
        code = int(left[0])
        log_file = run / "logs" / f"rank-{left[1]}.log"
        if code == EXIT_HUNG:
            logger.info(f"no progress: {reports[-1]['verdict']}")
        elif code != EXIT_STOPPED and log_file.is_file():
            logger.info("\n".join(log_file.read_text(errors="replace").splitlines()[-TAIL_LINES:]))
    why = AGAIN.get(code) or (
        "a rank was killed from outside" if not left and code >= 128 else ""
    )  # out of memory, or its node
    if not why:
        return code, ""
    requeue = f"scontrol requeue {here.job_id}"
    if code == EXIT_HUNG and (new := _exclude(run, reports)):
        why += f"; {', '.join(new)} did so twice and is left out from now on ({run / EXCLUDED})"
        code_folder = Path.cwd()
        if code_folder.is_relative_to(run):  # submitted by the launcher, which knows how
            logger.info(f"{why}; another job goes on")
            options = [
                *sbatch_options(Request(str(run)).load().config, code_folder),
                f"--dependency=afterany:{here.job_id}",
            ]
            sbatch = shlex.join(
                [
                    "env",
                    "-u",
                    "SLURM_RESTART_COUNT",
                    "sbatch",
                    "--parsable",
                    *options,
                    SCRIPT,
                    str(run),
                ]
            )
            return (
                code,
                f"next=$({sbatch}) && echo $next > {shlex.quote(str(run / JOB))} || {requeue}",
            )
        why += f"; a requeue cannot do that, so better submit it again: sbatch --exclude={','.join(new)}"
    logger.info(f"{why}; back into the queue")
    return code, requeue


def _exclude(run: Path, reports: Sequence[dict[str, Any]]) -> list[str]:
    """Return the nodes that are left out from now on, because they were to blame for a hang ``TWICE``."""
    blamed = Counter(
        node for report in reports for node in {beat["node"] for beat in report["odd"]}
    )
    new = [node for node, count in blamed.items() if count >= TWICE and node not in excluded(run)]
    if new:
        with open(run / EXCLUDED, "a") as file:
            file.writelines(
                f"{node} hung {blamed[node]} times: see {HANGS}; take this line out when the node is mended\n"
                for node in new
            )
    return new


def main(command: str, first: str, second: str, *more: str) -> str:
    """Return what slurm/train.sbatch asks for."""
    if command == "begin":
        return "{} {} {}".format(*begin(more[0], more[1:], nodes=int(first), tasks=int(second)))
    return "code={} again={}".format(*map(shlex.quote, map(str, end(Path(second), int(first)))))


if __name__ == "__main__":
    log.setup()
    try:
        print(main(*sys.argv[1:]))
    except Exception as error:
        if (code := exit_code(error)) is None:
            raise
        sys.exit(code)
