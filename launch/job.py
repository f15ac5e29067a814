"""What a Slurm job does beside training: slurm/train.sbatch calls this before its srun and after
it, on the first node.

python -m launch.job begin CONFIG_OR_RUN [key=value ...]    prints "run NODES RANKS CORES PORT
                                                            ATTEMPT RUN", or "ask JOB": what Slurm
                                                            says of JOB, and then the same again
python -m launch.job end CODE ATTEMPT RUN                   prints "exit CODE", then the command by
                                                            which the run goes on

What is printed for the shell begins with MARK: whatever else comes (of a site's TaskProlog, of a
container) is none of it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGUSR1
from typing import Any

from hfscale import log
from hfscale.checkpoint import layout
from hfscale.config.schema import TrainConfig
from hfscale.dist.world import Allocation, allocation, gpus_here, job_port
from hfscale.errors import EXIT_HUNG, EXIT_STOPPED, ConfigError, exit_code
from hfscale.log import logger
from hfscale.monitor.fence import Fence
from hfscale.records import Count, Record, load
from hfscale.run_files import CHECKPOINTS, EXCLUDED, HANGS, JOB, LOGS, RANK_LOG, REPORT, RESTARTS
from hfscale.shards.files import write_atomically
from launch import run_dir
from launch.queue import TOLD, NoAnswer, asked, cores_per_rank, facts, hold, ranks_per_node
from launch.request import Request, quote
from launch.slurm import SCRIPT, before, excluded, prepare, sbatch_options

MARK = "hfscale: "  # before each line that is for slurm/train.sbatch
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


@dataclass(frozen=True)
class Begun:
    """How the ranks are to be started: on the first ``nodes`` of the allocation, ``tasks`` on
    each.
    """

    nodes: int
    tasks: int
    cores: int  # of a rank
    port: int  # of the rendezvous, free on the first node
    attempt: int
    run: Path

    def __str__(self) -> str:
        numbers = (self.nodes, self.tasks, self.cores, self.port, self.attempt)
        return f"run {' '.join(map(str, numbers))} {self.run}"


def begin(source: str, overrides: Sequence[str]) -> Begun:
    """Return how the ranks of this Slurm job are to be started, on the first node of which this
    runs; the run directory is held.

    Raises:
        UserError: as ``launch.slurm.launch``; and if another job holds it, or this one restarts
            again and again.
    """
    here = allocation()
    if here is None:
        raise ConfigError(
            "this is not a Slurm job",
            where=SCRIPT,
            remedy=f"submit it: sbatch --nodes=N {SCRIPT} CONFIG",
        )
    loaded = Request(source, tuple(overrides)).load()
    config, told = loaded.config, facts(here.job_id) or {}
    tasks = ranks_per_node(here)
    nodes = usable_nodes(config, here.nodes, tasks)
    said = before(
        config,
        nodes * tasks,
        gpus=here.gpus_per_node > 0,
        limit=told.get("TimeLimit"),
    )
    if 0 < tasks < gpus_here():
        said.append(f"{tasks} ranks on a node with {gpus_here()} GPUs: the others stay idle")
    for line in said:
        logger.info(f"notice: {line}")
    with run_dir.locked(config.run_dir):
        take(config, here)
        prepare(loaded, launcher="slurm", procs=nodes * tasks)
        attempt = run_dir.take(config.run_dir, launcher="slurm")
    idle = f" ({here.nodes - nodes} stay idle: the batch does not divide)"
    logger.info(
        f"job {here.job_id}, restart {here.restarts}: {nodes * tasks} ranks on {nodes} of the "
        "nodes "
        f"{here.node_list}{idle if nodes < here.nodes else ''}; logs: {config.run_dir / LOGS}"
    )
    return Begun(
        nodes,
        tasks,
        cores_per_rank(here, tasks),
        job_port(here.job_id),
        attempt.number,
        config.run_dir,
    )


def usable_nodes(config: TrainConfig, nodes: int, tasks: int) -> int:
    """Return the most of ``nodes`` among which the global batch divides; all of them where
    ``cluster.min_nodes`` asks for no fewer.
    """
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
    saved = layout.committed(config.run_dir / CHECKPOINTS)
    start = {"job": here.job_id, "checkpoint": saved[-1].name if saved else None}
    file = config.run_dir / RESTARTS
    last = load(file, _Start, what="the record of restarts").as_dict() if file.is_file() else {}
    restarts = last["restarts"] + 1 if last.items() >= start.items() else 0
    if restarts > config.cluster.max_restarts:
        raise ConfigError(
            f"job {here.job_id} was restarted {restarts} times without getting beyond "
            f"{start['checkpoint'] or 'its start'}",
            where="cluster.max_restarts",
            value=config.cluster.max_restarts,
            remedy="see why in the logs; then submit it again, or raise the limit",
        )
    write_atomically(file, json.dumps({**start, "restarts": restarts}).encode())


def end(run: Path, code: int, attempt: int) -> tuple[int, str]:
    """Return the job's exit code and the shell command by which the run goes on ("" if it should
    not); why is said on stderr.

    srun reports the ranks that it killed: ``code`` is theirs. The first one that left by itself has
    left its code and its number.
    """
    here, fence = allocation(), Fence(run, attempt)
    assert here is not None
    left = fence.told()
    reports = [
        load(file, _Hang, what="the report of a hang").as_dict()
        for file in sorted(
            (run / HANGS).glob(f"*/{REPORT}"), key=lambda file: int(file.parent.name)
        )
    ]
    if left:
        code = left[0]
        log_file = run / LOGS / RANK_LOG.format(left[1])
        own = run / HANGS / str(attempt) / REPORT
        if code == EXIT_HUNG and own.is_file():
            logger.info(f"no progress: {load(own, _Hang, what='the report of a hang').verdict}")
        elif code != EXIT_STOPPED and log_file.is_file():
            logger.info("\n".join(log_file.read_text(errors="replace").splitlines()[-TAIL_LINES:]))
    fence.end(code)
    if fence.passed():  # to requeue the job would end the one that took over, where it is the same
        logger.info(fence.superseded())
        return code, ""
    if not left and code == 128 + SIGUSR1:
        code = EXIT_STOPPED  # a rank that had not begun: there is nothing to save
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
                f"next=$({sbatch}) && echo $next > {quote(run / JOB)} || {requeue}",
            )
        why += (
            "; a requeue cannot do that, so better submit it again: sbatch "
            f"--exclude={','.join(new)}"
        )
    logger.info(f"{why}; back into the queue")
    return code, requeue


def _exclude(run: Path, reports: Sequence[dict[str, Any]]) -> list[str]:
    """Return the nodes that are left out from now on, because they were to blame for a hang
    ``TWICE``.
    """
    blamed = Counter(
        node for report in reports for node in {beat["node"] for beat in report["odd"]}
    )
    new = [node for node, count in blamed.items() if count >= TWICE and node not in excluded(run)]
    if new:
        with open(run / EXCLUDED, "a") as file:
            file.writelines(
                f"{node} hung {blamed[node]} times: see {HANGS}; take this line out when the "
                "node is mended\n"
                for node in new
            )
    return new


def main(command: str, *words: str) -> list[str]:
    """Return the lines that slurm/train.sbatch reads."""
    if command == "begin":
        try:
            return [str(begin(words[0], words[1:]))]
        except NoAnswer as unknown:
            if shutil.which("scontrol") or TOLD not in os.environ or unknown.job in asked():
                raise
            return [f"ask {unknown.job}"]  # a container without Slurm's commands
    code, again = end(Path(words[2]), int(words[0]), int(words[1]))
    return [f"exit {code}", *([again] if again else [])]


if __name__ == "__main__":
    log.setup()
    try:
        for line in main(*sys.argv[1:]):
            print(f"\n{MARK}{line}")
    except Exception as error:
        if (code := exit_code(error)) is None:
            raise
        sys.exit(code)
