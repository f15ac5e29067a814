"""One rank of a job: `python -m hfscale.worker RUN_DIR/config.yaml`. Finds its place in the world, runs the job, and leaves in order.

Exit codes: 0 done; 2 a user's mistake; 75 stopped on request, saved, may be run again; 76 unhealthy numbers; 77 hung, or lost the
other ranks, may be run again; anything else failed.
On an error no collective is called: the other ranks may be anywhere, and the launcher ends them.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from hfscale import log
from hfscale.config.load import load_config
from hfscale.config.schema import Section
from hfscale.dist.secret import known_secret
from hfscale.dist.stop import WARNINGS, StopRequest
from hfscale.dist.world import Allocation, World, allocation, node_name
from hfscale.errors import EXIT_DONE, EXIT_HUNG, EXIT_STOPPED, CheckpointError, exit_code, lost_peer
from hfscale.monitor.heartbeat import watching
from hfscale.packages import refuse_wrong_versions

JOB = "job"  # in a run directory: the id of the Slurm job that holds it, or held it last (launch/queue.py)
EXIT_CODE = "exit_code"  # in the run directory of a Slurm job: code and rank of the first that did not end well
# the section of a config that names the job -> its module
JOBS = {
    "predict": "hfscale.jobs.predict",
    "harness": "hfscale.jobs.harness",
    "evaluate": "hfscale.jobs.shards",
    "objective": "hfscale.jobs.train",
    "task": "hfscale.jobs.train",
}


def job_of(config: Section) -> Any:
    """Return the module with ``run(config, world, stop) -> bool`` that does what ``config`` says: True when done, False when stopped."""
    return import_module(JOBS[next(section for section in JOBS if hasattr(config, section))])


def run(config_path: Path, on_hang: Callable[[int], None] = lambda rank: None) -> int:
    """Return the exit code of the job that ``config_path`` describes; ``on_hang`` as in ``monitor/heartbeat.py``."""
    stop = StopRequest().listen(
        WARNINGS
    )  # before the slow imports: Slurm's signal would end a process that does not listen
    import torch

    world = World.from_environment().sharing(known_secret(config_path.parent))
    log.setup(rank=world.rank)
    config = load_config(config_path, decided=True).config
    if world.rank == 0 and (here := allocation()):
        _refuse_second_job(config_path.parent / JOB, here)
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # else DeepSpeed prints on stdout that it found none
    refuse_wrong_versions()
    job = job_of(config)
    with watching(
        config_path.parent,
        rank=world.rank,
        world_size=world.world_size,
        node=node_name(),
        on_hang=on_hang,
        timeout_s=config.train.hang_timeout_s if hasattr(config, "train") else None,
    ):  # predictions have an uneven pace
        return EXIT_DONE if job.run(config, world, stop) else EXIT_STOPPED


def _refuse_second_job(file: Path, here: Allocation) -> None:
    """Return if the Slurm job around this process holds the run directory, now or before.

    Raises:
        CheckpointError: naming the job that does. Whether that one still lives is known to the launcher only.
    """
    with suppress(FileExistsError), open(file, "x") as new:
        new.write(here.job_id)
    if (holder := file.read_text().strip()) not in (here.job_id, here.array_id):
        raise CheckpointError(
            "another Slurm job holds this run directory, or held it last",
            where=file.parent,
            value=f"job {holder}",
            remedy=f"start this one by slurm/train.sbatch, which asks whether that one has ended; or remove {file}",
        )


def main() -> None:
    """Run one rank and end its process."""
    config_path, peer_ended = Path(sys.argv[1]), False

    def tell(code: int, rank: int) -> None:  # srun gives the code of those it kills then
        with suppress(OSError), open(config_path.parent / EXIT_CODE, "x") as file:
            print(code, rank, file=file)

    try:
        code = run(
            config_path, on_hang=lambda rank: tell(EXIT_HUNG, rank) if allocation() else None
        )
    except (
        BaseException
    ) as error:  # whatever it is, this rank must not linger in a collective's destructor
        known = exit_code(error)
        if known is None:
            traceback.print_exc()
        peer_ended = known is None and lost_peer(error)
        code = known or (EXIT_HUNG if peer_ended else 1)
    if code and not peer_ended and (job := allocation()):
        tell(code, job.rank)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != EXIT_DONE:
        os._exit(
            code
        )  # an interpreter that is ending is ended by a second signal, and stopped ranks leave as near together as can be
    sys.exit(code)


if __name__ == "__main__":
    main()
