"""One rank of a job: `python -m hfscale.worker RUN_DIR/config.yaml`. Finds its place in the world,
runs the job, and leaves in order.

Exit codes: 0 done; 2 a user's mistake; 75 stopped on request, saved, may be run again; 76 unhealthy
numbers; 77 hung, lost the other ranks, or superseded by a younger attempt, may be run again;
anything else failed. On an error no collective is called: the other ranks may be anywhere, and the
launcher ends them.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from hfscale import log, run_files
from hfscale.config.load import load_config
from hfscale.config.schema import TrainConfig
from hfscale.config.section import Section
from hfscale.dist.secret import known_secret
from hfscale.dist.stop import WARNINGS, StopRequest
from hfscale.dist.world import Allocation, World, allocation, given_attempt, node_name
from hfscale.errors import (
    EXIT_DONE,
    EXIT_HUNG,
    EXIT_STOPPED,
    CheckpointError,
    ConfigError,
    code_of,
    exit_code,
    lost_peer,
)
from hfscale.monitor.fence import Fence, newest, take
from hfscale.monitor.heartbeat import watching
from hfscale.monitor.phases import PHASES
from hfscale.packages import refuse_wrong_versions
from hfscale.rehearsal.plan import is_rehearsal

# the section of a config that names the job -> its module
JOBS = {
    "predict": "hfscale.jobs.predict",
    "harness": "hfscale.jobs.harness",
    "evaluate": "hfscale.jobs.shards",
    "objective": "hfscale.jobs.train",
    "task": "hfscale.jobs.train",
}
REHEARSAL = "hfscale.rehearsal.job"  # trains too, and what a plan in the run directory says


def job_of(
    config: Section, run_dir: Path | None = None
) -> Callable[[Section, World, StopRequest], bool]:
    """Return what does what ``config`` says: it returns True when done, False when stopped."""
    section = next(section for section in JOBS if hasattr(config, section))
    module = REHEARSAL if run_dir and is_rehearsal(run_dir) else JOBS[section]
    job: Callable[[Section, World, StopRequest], bool] = import_module(module).run
    return job


def run(config_path: Path, on_hang: Callable[[int], None] = lambda rank: None) -> int:
    """Return the exit code of the job that ``config_path`` describes; ``on_hang`` as in
    ``monitor/heartbeat.py``.
    """
    # before the slow imports: Slurm's signal would end a process that does not listen
    stop = StopRequest().listen(WARNINGS)
    PHASES.restart()
    import torch

    world = World.from_environment().sharing(known_secret(config_path.parent))
    log.setup(rank=world.all.rank)
    config = load_config(config_path, decided=True).config
    trains = isinstance(config, TrainConfig)
    if trains:
        _refuse_other_folder(config_path, config)
    if world.all.rank == 0 and (here := allocation()):
        _refuse_second_job(config_path.parent / run_files.JOB, here)
    if not torch.cuda.is_available():
        # else DeepSpeed prints on stdout that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    refuse_wrong_versions()
    run_dir = config_path.parent
    job = job_of(config, run_dir)
    fence = attempt_of(run_dir, world) if world.all.rank == 0 else None
    if fence:
        world = replace(world, attempt=fence.number)
    with (
        fence.kept() if fence else nullcontext(),
        watching(
            run_dir,
            rank=world.all.rank,
            ranks=world.all.size,
            node=node_name(),
            on_hang=on_hang,
            timeout_s=config.train.hang_timeout_s if trains else None,  # others have no even pace
            attempt=world.attempt,
        ),
    ):
        code = EXIT_DONE if job(config, world, stop) else EXIT_STOPPED
    if fence:
        fence.end(code)
    return code


def attempt_of(run_dir: Path, world: World) -> Fence:
    """Return the attempt that rank 0 is of: the one its launcher took, or a new one.

    Raises:
        CheckpointError: if there was no launcher to look whether an older one is at work, and one
            is.
    """
    if world.attempt and (given := Fence(run_dir, world.attempt)).folder.is_dir():
        return given
    here, old = allocation(), newest(run_dir)
    if old and not here and old.alive():
        raise CheckpointError(
            "another job is at work in this run directory",
            where=run_dir,
            value=str(old.owner()),
            remedy="wait for it, stop it, or start this one under another run.name",
        )
    return take_attempt(run_dir, launcher="none")


def take_attempt(
    run_dir: Path, *, launcher: str, queued: tuple[float, float] = (0.0, 0.0)
) -> Fence:
    """Return the attempt that begins now: every older one that still lives can write no more.
    ``queued`` as in ``monitor/fence.py``.
    """
    here = allocation()
    if here is None:
        return take(run_dir, launcher=launcher)
    return take(
        run_dir,
        launcher=launcher,
        job=here.job_id,
        restart=here.restarts,
        nodes=here.node_list,
        queued=queued,
    )


def _refuse_other_folder(config_path: Path, config: TrainConfig) -> None:
    """Return if a run's config lies in its run directory.

    Raises:
        ConfigError: if not: what ranks write beside it would lie elsewhere than the run.
    """
    if not (config.run_dir / config_path.name).exists() or not os.path.samefile(
        config_path, config.run_dir / config_path.name
    ):
        raise ConfigError(
            "this config does not lie in its run directory",
            where=config_path,
            value=str(config.run_dir),
            remedy=f"hfscale {config.verb} {shlex.quote(str(config_path))} makes the run "
            "directory and starts the "
            "ranks; torchrun and srun take its config.yaml",
        )


def _refuse_second_job(file: Path, here: Allocation) -> None:
    """Return if the Slurm job around this process holds the run directory, now or before.

    Raises:
        CheckpointError: naming the job that does. Whether that one still lives is known to the
            launcher only.
    """
    with suppress(FileExistsError), open(file, "x") as new:
        new.write(here.job_id)
    if (holder := file.read_text().strip()) not in (here.job_id, here.array_id):
        raise CheckpointError(
            "another Slurm job holds this run directory, or held it last",
            where=file.parent,
            value=f"job {holder}",
            remedy="start this one by slurm/train.sbatch, which asks whether that one has "
            f"ended; or remove {file}",
        )


def main() -> None:
    """Run one rank and end its process."""
    config_path, peer_ended = Path(sys.argv[1]), False
    fence = Fence(config_path.parent, given_attempt())  # srun gives the code of those it kills
    try:
        code = run(
            config_path,
            on_hang=lambda rank: fence.tell(EXIT_HUNG, rank) if allocation() else None,
        )
    except BaseException as error:
        # whatever it is, this rank must not linger in a collective's destructor
        known = exit_code(error)
        if known is None:
            traceback.print_exc()
        peer_ended = known is None and lost_peer(error)
        code = code_of(error)
    if code and not peer_ended and (job := allocation()):
        fence.tell(code, job.rank)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != EXIT_DONE:
        # an interpreter that is ending is ended by a second signal, and stopped ranks leave as near
        # together as can be
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
