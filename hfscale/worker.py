"""One rank of a job: `python -m hfscale.worker RUN_DIR/config.yaml`. Finds its place in the world, runs the job, and leaves in order.

Exit codes: 0 done; 2 a user's mistake; 75 stopped on request, saved, may be run again; 76 unhealthy numbers; anything else failed.
On an error no collective is called: the other ranks may be anywhere, and the launcher ends them.
"""
from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

from hfscale import log
from hfscale.config.load import load_config
from hfscale.dist.world import World
from hfscale.errors import EXIT_DONE, EXIT_STOPPED, exit_code

JOBS = {"objective": "hfscale.jobs.pretrain"}  # the section of a config that names the job -> its module, with run(config, world) -> bool


def run(config_path: Path) -> int:
    """Return the exit code of the job that ``config_path`` describes."""
    import torch

    world = World.from_environment()
    log.setup(rank=world.rank)
    config = load_config(config_path).config
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints on stdout that it found none
    job = import_module(JOBS[next(section for section in JOBS if hasattr(config, section))])
    return EXIT_DONE if job.run(config, world) else EXIT_STOPPED


def main() -> None:
    """Run one rank and end its process."""
    try:
        code = run(Path(sys.argv[1]))
    except BaseException as error:  # whatever it is, this rank must not linger in a collective's destructor
        known = exit_code(error)
        if known is None:
            traceback.print_exc()
        code = known or 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in (EXIT_DONE, EXIT_STOPPED):
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
