"""Trials of a config for `hfscale tune`: each is a start of its own through the local launcher, in
a folder that is thrown away.

    python -m launch.trials FOLDER        starts the ranks of the trial that FOLDER/asked.json says

A trial that dies, of memory or otherwise, takes nobody with it; if the command that asked dies, so
does the trial.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from hfscale import log
from hfscale.config.load import Loaded
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.errors import EXIT_DONE, CheckpointError, UserError, exit_code
from hfscale.records import load
from hfscale.run_files import LOGS, RANK_LOG
from hfscale.tuning.seen import SEEN, TRIAL, Seen, Trial
from launch.interpreter import python
from launch.job import Training
from launch.local import die_with, launch
from launch.request import Request

WORKER = "hfscale.tuning.trial"
ASKED, OUT, RUN = "asked.json", "out.txt", "run"
TAIL_LINES = 12
KILLED = 128 + 9  # by the kernel, where memory ran out
# a trial saves nothing, draws nothing, and ends when it has taken its steps
QUIET = {
    "train.epochs": "null",
    "train.tokens": "null",
    "train.patience": "null",
    "checkpoint.every_steps": "null",
    "checkpoint.every_minutes": "null",
    "checkpoint.keep_best": "null",
    "metrics.every_steps": "1",
    "metrics.writers": "[]",
    "metrics.samples": "null",
    "metrics.profile": "null",
    "health.policy": "warn",
    "health.replicas_every_steps": "null",
}


@dataclass(frozen=True)
class Asked:
    """Which start a trial is, and the process that waits for it."""

    source: str
    overrides: list[str]
    procs: int
    parent: int


class Trials:
    """Trials of one config in ``procs`` ranks on this machine, in folders below ``home``."""

    def __init__(
        self, source: str, overrides: Sequence[str], *, procs: int, memory_gib: float, home: Path
    ) -> None:
        """``memory_gib``: of a rank; 0: what its GPU has."""
        self.source, self.overrides, self.procs = source, overrides, procs
        self.memory_gib, self.home = memory_gib, home
        self.loaded: Loaded[TrainConfig] = Request(source, tuple(overrides)).load()
        self._numbers = count(1)

    def run(
        self, changes: Mapping[str, object], *, steps: int, rates: Sequence[float] = ()
    ) -> list[Seen]:
        """Return what each rank saw of so many ``steps`` with ``changes`` of the config. If one ran
        out of memory, all say so.

        Raises:
            CheckpointError: if the trial ended otherwise, with the last lines of its log.
        """
        folder = self.home / f"trial-{next(self._numbers)}"
        folder.mkdir()
        ours = {**QUIET, "train.steps": steps + 1, "run.root": folder, "run.name": RUN, **changes}
        if isinstance(self.loaded.config, RunConfig):
            ours["data.stages"] = "[]"
        overrides = [*self.overrides, *(f"{key}={value}" for key, value in ours.items())]
        trial = Trial(steps, self.memory_gib, [*rates])
        asked = Asked(self.source, overrides, self.procs, os.getpid())
        (folder / TRIAL).write_text(json.dumps(asdict(trial)))
        (folder / ASKED).write_text(json.dumps(asdict(asked)))
        code = _finished(folder)
        files = [folder / SEEN.format(rank) for rank in range(self.procs)]
        seen = [load(file, Seen, what="a trial") for file in files if file.is_file()]
        short = next((one for one in seen if one.outcome == "memory"), None)
        if short is None and code == KILLED:
            short = Seen("memory", "the kernel killed a rank")
        if short:
            return [short]
        if code != EXIT_DONE or len(seen) < self.procs:
            raise _failed(folder, code)
        return seen


def _finished(folder: Path) -> int:
    """Return the exit code of the trial in ``folder``, which this process waits for; whatever ends
    the waiting ends the trial.
    """
    with open(folder / OUT, "wb") as out:
        process = subprocess.Popen(
            python("launch.trials", folder),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is this command's, which kills it
        )
    try:
        return process.wait()
    finally:
        process.kill()  # and its ranks with it
        process.wait()


def _failed(folder: Path, code: int) -> CheckpointError:
    """Return why a trial ended: the last lines of what it said, its ranks' logs among them."""
    logs = folder / RUN / LOGS
    files = [folder / OUT, *sorted(logs.glob(RANK_LOG.format("*")))]
    texts = [file.read_text(errors="replace").strip() for file in files if file.is_file()]
    lines = max(texts, key=len, default="").splitlines()[-TAIL_LINES:]
    return CheckpointError(
        "a trial of this config failed:\n" + "\n".join(lines),
        where="hfscale tune",
        value=f"exit code {code}",
        remedy="see that the config trains at all: hfscale pretrain CONFIG --launcher debug",
    )


def main() -> None:
    """Start the ranks of a trial, and end with their exit code."""
    folder = Path(sys.argv[1])
    asked = load(folder / ASKED, Asked, what="the trial")
    die_with(asked.parent)
    log.setup()
    request = Request(asked.source, tuple(asked.overrides), procs=asked.procs, worker=WORKER)
    try:
        code = launch(Training(request))
    except UserError as error:
        code = exit_code(error) or 1
    sys.exit(code)


if __name__ == "__main__":
    main()
