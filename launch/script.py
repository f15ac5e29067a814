"""What a Slurm job does beside its ranks: slurm/train.sbatch calls this before its srun and after
it, on the first node.

python -m launch.script begin CONFIG_OR_RUN [key=value ...]  prints "run NODES RANKS CORES PORT
                                                            ATTEMPT RUN", or "ask JOB": what Slurm
                                                            says of JOB, and then the same again
python -m launch.script end CODE ATTEMPT RUN                prints "exit CODE", then the command by
                                                            which the run goes on

What is printed for the shell begins with MARK: whatever else comes (of a site's TaskProlog, of a
container) is none of it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGUSR1

from hfscale import log
from hfscale.checks.start import refuse_limits
from hfscale.dist.world import allocation, gpus_here, job_port
from hfscale.errors import EXIT_HUNG, EXIT_STOPPED, ConfigError, exit_code
from hfscale.log import logger
from hfscale.monitor.fence import Fence
from hfscale.records import Record, load
from hfscale.run_files import EXCLUDED, HANGS, JOB, LOGS, RANK_LOG, REPORT
from launch.attempt import begun
from launch.job import open_job
from launch.queue import TOLD, NoAnswer, asked, cores_per_rank, facts, ranks_per_node
from launch.request import quote
from launch.slurm import SCRIPT, excluded, sbatch_options
from launch.start import before

MARK = "hfscale: "  # before each line that is for slurm/train.sbatch
TWICE = 2  # hangs of a node, after which the run leaves it out
TAIL_LINES = 20
HANG = "the report of a hang"
# after which a job is requeued
AGAIN = {
    EXIT_STOPPED: "stopped and saved",
    EXIT_HUNG: "ranks hung, or lost one another",
}


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
    refuse_limits()  # as site.sh has set them
    job, told = open_job(source, overrides), facts(here.job_id) or {}
    tasks = ranks_per_node(here)
    nodes = job.usable_nodes(here.nodes, tasks)
    said = before(job, nodes * tasks, gpus=here.gpus_per_node > 0, limit=told.get("TimeLimit"))
    if 0 < tasks < gpus_here():
        said.append(f"{tasks} ranks on a node with {gpus_here()} GPUs: the others stay idle")
    for line in said:
        logger.info(f"notice: {line}")
    with begun(job, launcher="slurm", procs=nodes * tasks) as attempt:
        number = attempt.number
    idle = f" ({here.nodes - nodes} stay idle: the batch does not divide)"
    logger.info(
        f"job {here.job_id}, restart {here.restarts}: {nodes * tasks} ranks on {nodes} of the "
        "nodes "
        f"{here.node_list}{idle if nodes < here.nodes else ''}; logs: {job.folder / LOGS}"
    )
    return Begun(
        nodes,
        tasks,
        cores_per_rank(here, tasks),
        job_port(here.job_id),
        number,
        job.folder,
    )


def end(run: Path, code: int, attempt: int) -> tuple[int, str]:
    """Return the job's exit code and the shell command by which the run goes on ("" if it should
    not); why is said on stderr.

    srun reports the ranks that it killed: ``code`` is theirs. The first one that left by itself has
    left its code and its number.
    """
    here, fence = allocation(), Fence(run, attempt)
    assert here is not None
    left = fence.told()
    if left:
        code = left[0]
        _tell(run, code, rank=left[1], attempt=attempt)
    fence.end(code)
    if fence.passed():  # to requeue the job would end the one that took over, where it is the same
        logger.info(fence.superseded())
        return code, ""
    if not left and code == 128 + SIGUSR1:
        code = EXIT_STOPPED  # a rank that had not begun: there is nothing to save
    # out of memory, or its node
    why = AGAIN.get(code) or ("a rank was killed from outside" if not left and code >= 128 else "")
    if not why:
        return code, ""
    requeue = f"scontrol requeue {here.job_id}"
    new = _exclude(run) if code == EXIT_HUNG else []
    if new:
        why += f"; {', '.join(new)} did so twice and is left out from now on ({run / EXCLUDED})"
        code_folder = Path.cwd()
        if code_folder.is_relative_to(run):  # submitted by the launcher, which knows how
            logger.info(f"{why}; another job goes on")
            sbatch = _successor(run, code_folder, after=here.job_id)
            return code, f"next=$({sbatch}) && echo $next > {quote(run / JOB)} || {requeue}"
        why += (
            "; a requeue cannot do that, so better submit it again: sbatch "
            f"--exclude={','.join(new)}"
        )
    logger.info(f"{why}; back into the queue")
    return code, requeue


def _tell(run: Path, code: int, *, rank: int, attempt: int) -> None:
    """Say why the first rank left that did so by itself: the verdict on a hang, or its last
    lines.
    """
    log_file, own = run / LOGS / RANK_LOG.format(rank), run / HANGS / str(attempt) / REPORT
    if code == EXIT_HUNG and own.is_file():
        logger.info(f"no progress: {load(own, _Hang, what=HANG).verdict}")
    elif code != EXIT_STOPPED and log_file.is_file():
        logger.info("\n".join(log_file.read_text(errors="replace").splitlines()[-TAIL_LINES:]))


def _successor(run: Path, code_folder: Path, *, after: str) -> str:
    """Return the shell command that submits another job of ``run``, which waits for the end of the
    job ``after``.
    """
    options = [*sbatch_options(open_job(str(run)), code_folder), f"--dependency=afterany:{after}"]
    command = ["sbatch", "--parsable", *options, SCRIPT, str(run)]
    return shlex.join(["env", "-u", "SLURM_RESTART_COUNT", *command])


def _exclude(run: Path) -> list[str]:
    """Return the nodes that are left out from now on, because they were to blame for a hang
    ``TWICE``.
    """
    files = (run / HANGS).glob(f"*/{REPORT}")
    reports = [
        load(file, _Hang, what=HANG)
        for file in sorted(files, key=lambda file: int(file.parent.name))
    ]
    blamed = Counter(node for report in reports for node in {beat.node for beat in report.odd})
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
