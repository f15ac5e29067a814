"""A few steps under torch's profiler, then one under DeepSpeed's: planned in the config, or asked
of a run that is under way.

    RUN_DIR/profiles/request.json        what `hfscale profile` asks of the run
    RUN_DIR/profiles/attempt-A-step-N/   N: the first step that was looked at
        rank-R.pt.trace.json.gz          for Perfetto, Chrome and TensorBoard's profiler plug-in
        rank-R-memory.pickle             allocations on a GPU, for pytorch.org/memory_viz
        rank-R-flops.txt                 DeepSpeed's: operations, time, parameters of each module
        rank-R.txt                       the operators that take most time; written last
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile

from hfscale import run_files
from hfscale.config import schema
from hfscale.engine.engine import Engine
from hfscale.log import logger
from hfscale.monitor.request import ProfileRequest, read_request
from hfscale.training.observers.base import Observer, Step

MOST_EXPENSIVE = 10  # operators that are named
MOST_ALLOCATIONS = 100_000  # that a snapshot of GPU memory remembers


class Profile(Observer):
    """Profiles this rank. Each rank has one, and looks for itself whether it was asked: profiling
    calls no collective.
    """

    def __init__(
        self, engine: Engine, *, run_dir: Path, attempt: int, plan: schema.Profile | None
    ) -> None:
        self._engine, self._run_dir, self._attempt = engine, run_dir, attempt
        self._rank = engine.all.rank
        self._plan = plan
        before = read_request(run_dir)
        self._answered = before.number if before else 0  # what was asked of an earlier attempt
        self._work: Iterator[None] | None = None
        self._steps_left = True
        self._step = 0  # that was looked at last

    def look(self, step: Step) -> None:
        """Go on with what is under way; begin what is planned, or was asked for, with the step
        that comes. What fails is said, and the run goes on.
        """
        self._step = step.number
        if self._work is None:
            request = self._asked(step)
            if request is None:
                return
            self._work = self._profile(step.number + 1, request.steps)
        self._go_on()

    def _go_on(self) -> None:
        assert self._work is not None, "something is under way"
        try:
            next(self._work)
        except StopIteration:
            self._work = None
        except (RuntimeError, OSError, ValueError, AttributeError, KeyError) as error:
            logger.warning(f"the profiler failed, and is left: {type(error).__name__}: {error}")
            self._work = None

    def close(self) -> None:
        """End what is under way with the steps that there were, and say of what was planned that
        the run did not come to it.
        """
        self._steps_left = False
        if self._work is not None:
            self._go_on()
        elif self._plan and self._rank == 0 and self._step + 1 < self._plan.at_step:
            logger.info(
                f"notice: no profile: the run ended at step {self._step}, before "
                f"metrics.profile.at_step={self._plan.at_step}"
            )

    def _asked(self, step: Step) -> ProfileRequest | None:
        """Return what this rank is to do from the next step on."""
        if self._plan and step.number + 1 == self._plan.at_step:
            request = ProfileRequest(
                number=0, steps=self._plan.steps, every_rank=self._plan.every_rank
            )
        elif step.watched and (found := read_request(self._run_dir)):
            if found.number == self._answered:
                return None
            self._answered, request = found.number, found
        else:
            return None
        return request if request.every_rank or self._rank == 0 else None

    def _profile(self, first: int, steps: int) -> Iterator[None]:
        """Profile ``steps`` steps from ``first`` on, and one more for its flops, as far as the run
        goes; yields before each.
        """
        folder = self._run_dir / run_files.PROFILES / f"attempt-{self._attempt}-step-{first}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._rank}"
        last = first + steps - 1
        flops = f"and step {last + 1} with DeepSpeed's profiler"
        logger.info(f"profiling steps {first} to {last}, {flops}: {folder}")
        on_gpu = self._engine.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        begin = perf_counter()
        if on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        profiler.start()
        done = 0
        try:
            yield
            done = 1
            while done < steps and self._steps_left:
                yield
                done += self._steps_left
        finally:
            profiler.stop()
            if on_gpu:
                torch.cuda.memory._dump_snapshot(str(folder / f"{name}-memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
        seconds = perf_counter() - begin
        profiler.export_chrome_trace(str(folder / f"{name}.pt.trace.json.gz"))
        if self._steps_left:
            with self._engine.flops_profiled(last + 1, folder / f"{name}-flops.txt"):
                yield
        text = operators(profiler, steps=done, seconds=seconds, on_gpu=on_gpu)
        (folder / run_files.PROFILED.format(self._rank)).write_text(text + "\n")
        short = f", of {steps} that were asked for: the run ended" if done < steps else ""
        logger.info(f"profile of {done} steps from step {first} on{short}; in {folder}\n{text}")


def operators(profiler: profile, *, steps: int, seconds: float, on_gpu: bool) -> str:
    """Return a table of the operators whose own time is longest, without what they call: on the
    GPU where there is one.
    """
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    memory_of = "self_device_memory_usage" if on_gpu else "self_cpu_memory_usage"
    events = sorted(profiler.key_averages(), key=lambda one: -getattr(one, time_of))
    whole_us = sum(getattr(one, time_of) for one in events) or 1.0
    lines = [
        f"{1e3 * seconds / steps:.1f} ms a step under the profiler, which slows it",
        f"{'operator':<44}{'calls':>8}{'ms a step':>12}{'share':>8}{'MiB a step':>12}",
    ]
    for one in events[:MOST_EXPENSIVE]:
        own_us, memory = getattr(one, time_of), getattr(one, memory_of)
        lines.append(
            f"{one.key[:43]:<44}{one.count / steps:>8.0f}{own_us / 1e3 / steps:>12.2f}"
            f"{own_us / whole_us:>8.1%}{memory / steps / 2**20:>12.1f}"
        )
    return "\n".join(lines)
