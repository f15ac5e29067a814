"""One rank of a trial of `hfscale tune`: a few steps of a config on the live engine, timed, with
the memory that they took; or a test of learning rates.

    python -m hfscale.tuning.trial RUN_DIR/config.yaml        beside RUN_DIR lies trial.json

Each rank leaves what it saw beside that (``Seen``). A trial that needs more memory than it may is
ended by its own rank, so that nobody else's memory is taken: a GPU says so itself, on a CPU a
thread looks at what is resident.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hfscale import log
from hfscale.config.load import load_config
from hfscale.dist import group
from hfscale.dist.world import World
from hfscale.errors import EXIT_DONE, UnhealthyError, UserError, exit_code
from hfscale.monitor.throughput import memory_now_gib, peak_memory_gib
from hfscale.records import load
from hfscale.run.run import Run
from hfscale.training.observers.base import Observer, Step
from hfscale.tuning.rates import Rising
from hfscale.tuning.seen import TRIAL, Seen, Trial

EXIT_MEMORY = 3  # more memory was needed than there may be
MOST = 0.95  # of a GPU: fragments grow for a while
LOOK_S = 0.02  # between two looks at what is resident
# in the message of an error that says no more than that memory ran out
RAN_OUT = ("can't allocate memory", "out of memory", "Cannot allocate memory")


class _Enough(Exception):
    """All steps of the trial are done."""


@dataclass
class Watch(Observer):
    """Notes each step, and ends the trial after the last one."""

    trial: Trial
    seen: Seen
    rising: Rising | None

    def wants(self, step: int) -> bool:
        """Return True: all figures of all steps are wanted."""
        return True

    def look(self, step: Step) -> None:
        """Note ``step``."""
        figures, seen = step.figures, self.seen
        seen.step_s.append(figures["step_s"])
        seen.tokens_per_s.append(figures["tokens_per_s"])
        seen.waited.append(figures["data_wait_s"] / figures["step_s"])
        seen.loss.append(figures["loss"])
        seen.rate.append(figures["lr"])
        if self.rising and self.rising.diverged(seen.loss):
            seen.outcome = "diverged"
            raise _Enough
        if step.number >= self.trial.steps:
            raise _Enough


def main() -> None:
    """Run one rank and end its process."""
    file = Path(sys.argv[1])
    folder, world = file.parents[1], World.from_environment()
    log.setup(rank=world.all.rank)
    trial, seen = load(folder / TRIAL, Trial, what="the trial"), Seen()

    def leave(code: int) -> None:
        """End this process: other ranks may be anywhere, so nothing is waited for."""
        seen.peak_gib = max(seen.peak_gib, held_gib())
        seen.write(folder, world.all.rank)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def over() -> None:
        most = trial.memory_gib or _most_of_gpu()
        seen.outcome, seen.why = "memory", f"it takes more than {most:.3g} GiB"
        leave(EXIT_MEMORY)

    if trial.memory_gib and not torch.cuda.is_available():
        _guard(trial.memory_gib, over)
    try:
        _train(file, world, trial, seen)
    except UnhealthyError as error:
        if not trial.rates:
            raise
        seen.outcome, seen.why = "diverged", str(error)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(why in str(error) for why in RAN_OUT):
            traceback.print_exc()
            leave(1)
        seen.outcome, seen.why = "memory", str(error).splitlines()[0]
        leave(EXIT_MEMORY)
    except UserError as error:
        leave(exit_code(error) or 1)
    except BaseException:
        traceback.print_exc()
        leave(1)
    if torch.cuda.is_available() and held_gib() > (trial.memory_gib or _most_of_gpu()):
        over()
    leave(EXIT_DONE)


def _train(file: Path, world: World, trial: Trial, seen: Seen) -> None:
    """Return when the steps of the trial are done."""
    config = load_config(file, decided=True).config
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device = group.start(world)
    trainer = Run(config, world).live(device)
    rising = None
    if trial.rates:
        rising = Rising(trial.rates[0], trial.rates[-1], steps=trial.steps)
        trainer.learning_rate = rising.rate
    trainer.observers = [*trainer.observers, Watch(trial, seen, rising)]
    try:
        trainer.run()
    except _Enough:
        group.barrier()


def held_gib() -> float:
    """Return the most that this rank has held: of its GPU what torch reserved, fragments and all;
    on a CPU what was resident.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return peak_memory_gib(torch.device("cpu"))


def _most_of_gpu() -> float:
    _, total = torch.cuda.mem_get_info()
    return MOST * total / 2**30


def _guard(most_gib: float, over: Callable[[], None]) -> None:
    """Call ``over`` as soon as more than ``most_gib`` are resident."""

    def watch() -> None:
        while memory_now_gib(torch.device("cpu"))[2] <= most_gib:
            time.sleep(LOOK_S)
        over()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
