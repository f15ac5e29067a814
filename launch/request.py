"""What was asked for: a config or a run, overrides, and how to start it.

A launcher is one module with `launch(job) -> int`, which takes a `Job` (launch/job.py) and returns
an exit code, and a line in `LAUNCHERS`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfscale.config.load import Loaded, load_config
from hfscale.config.schema import TrainConfig
from hfscale.dist.world import copies
from hfscale.errors import CheckpointError, ConfigError
from hfscale.run_files import CONFIG, is_run, no_run

LAUNCHERS = {
    "local": "launch.local:launch",
    "debug": "launch.debug:launch",
    "slurm": "launch.slurm:launch",
    "submitit": "launch.submit:launch",
}


@dataclass(frozen=True)
class Request:
    """``source`` is a YAML file or a run directory; None lets the launcher choose ``procs`` and
    ``port``.
    """

    source: str
    overrides: tuple[str, ...] = ()
    procs: int | None = None
    port: int | None = None
    dry_run: bool = False
    worker: str = "hfscale.worker"  # the module that is one rank; another one in tests

    def load(self, extra: Sequence[str] = ()) -> Loaded[TrainConfig]:
        """Return the config that was asked for, with ``extra`` overrides last.

        Raises:
            ConfigError: for everything that is wrong with it.
        """
        path = Path(self.source).resolve()
        # a run stays where it lies, also if moved
        home = [f"run.root={path.parent}", f"run.name={path.name}"] if path.is_dir() else []
        return load_config(config_file(self.source), [*home, *self.overrides, *extra])


def quote(path: object) -> str:
    """Return a path or a name as a shell wants it: what is printed as a command can be copied."""
    return shlex.quote(str(path))


def refuse_copies() -> None:
    """Return if this command was started once.

    Raises:
        ConfigError: if srun started it for every task of a step: each would start all ranks.
    """
    if (number := copies()) > 1:
        raise ConfigError(
            f"srun started this command {number} times, and each would start ranks",
            where="srun",
            remedy="leave srun out and say --launcher slurm: it starts the ranks with srun itself",
        )


def training_run(name: str | Path) -> Path:
    """Return the directory of the run ``name``, one that trains.

    Raises:
        CheckpointError: if it is none.
        ConfigError: if its config is damaged.
    """
    if not is_run(Path(name)):
        raise no_run(name)
    run_dir = Path(name).resolve()
    if not isinstance(load_config(run_dir / CONFIG, decided=True).config, TrainConfig):
        raise CheckpointError(
            "this folder is of scores or predictions, not of a run that trains",
            where=name,
            remedy="hfscale compare shows scores side by side",
        )
    return run_dir


def config_file(source: str) -> Path:
    """Return the YAML file that ``source`` stands for: itself, or the resolved config of a run
    directory.

    Raises:
        CheckpointError: if it is neither a file of YAML, by its name, nor a run directory.
    """
    path = Path(source)
    named = path.suffix in (".yaml", ".yml") or os.path.isfile(path)
    if not named and not is_run(path):
        raise no_run(source, remedy=f"give a YAML file, or a run directory, which holds {CONFIG}")
    return path / CONFIG if path.is_dir() else path
