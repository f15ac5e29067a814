"""One rank of a job: `python -m hfscale.worker RUN_DIR/config.yaml`. Finds its place in the world, runs the job, and leaves in order.

Exit codes: 0 done; 2 a user's mistake; 75 stopped on request, saved, may be run again; 76 unhealthy numbers; anything else failed.
On an error no collective is called: the other ranks may be anywhere, and the launcher ends them.
"""
from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from hfscale import log
from hfscale.config.load import load_config
from hfscale.dist.stop import WARNINGS, StopRequest
from hfscale.dist.world import World, allocation
from hfscale.errors import EXIT_DONE, EXIT_STOPPED, exit_code

EXIT_CODE = "exit_code"  # in the run directory of a Slurm job: code and rank of the first that did not end well
LOST_PEER = ("by peer", "remote process exited", "peer closed")  # gloo and NCCL, of a rank that died: this one is not the cause
# the section of a config that names the job -> its module, with run(config, world, stop) -> bool
JOBS = {"predict": "hfscale.jobs.predict", "objective": "hfscale.jobs.train", "task": "hfscale.jobs.train"}


def run(config_path: Path) -> int:
    """Return the exit code of the job that ``config_path`` describes."""
    stop = StopRequest().listen(WARNINGS)  # before the slow imports: Slurm's signal would end a process that does not listen
    import torch

    world = World.from_environment()
    log.setup(rank=world.rank)
    config = load_config(config_path).config
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints on stdout that it found none
    job = import_module(JOBS[next(section for section in JOBS if hasattr(config, section))])
    return EXIT_DONE if job.run(config, world, stop) else EXIT_STOPPED


def main() -> None:
    """Run one rank and end its process."""
    lost_peer = False
    try:
        code = run(Path(sys.argv[1]))
    except BaseException as error:  # whatever it is, this rank must not linger in a collective's destructor
        known = exit_code(error)
        if known is None:
            traceback.print_exc()
        code, lost_peer = known or 1, known is None and any(words in str(error) for words in LOST_PEER)
    if code and not lost_peer and (job := allocation()):
        with suppress(OSError), open(Path(sys.argv[1]).parent / EXIT_CODE, "x") as file:  # srun gives the code of those it kills then
            print(code, job.rank, file=file)
    sys.stdout.flush()
    sys.stderr.flush()
    if code != EXIT_DONE:
        os._exit(code)  # an interpreter that is ending is ended by a second signal, and stopped ranks leave as near together as can be
    sys.exit(code)


if __name__ == "__main__":
    main()
