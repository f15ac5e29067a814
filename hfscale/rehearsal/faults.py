"""What happens to the ranks of a rehearsal: one thing an attempt, at the step that the plan says.

The ranks do it to themselves, so that nobody has to watch the job: who submitted it may be asleep,
and its nodes far away. What they use is what a person or Slurm would: scancel, a signal to the
launcher, SIGKILL, SIGSTOP, and the warning before the time limit, for which they wait.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from hfscale.dist.group import barrier
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World, allocation
from hfscale.monitor.fence import Fence
from hfscale.monitor.heartbeat import beat
from hfscale.rehearsal import plan as planned
from hfscale.rehearsal.plan import Fault, Journal, Plan
from hfscale.training.observers.base import Observer, Step

LATE_S = 15.0  # how much later than it should a warning may come
POLL_S = 0.1
BEAT_S = 1.5


class Faults(Observer):
    """Does the first fault of ``plan`` that was not done yet; rank 0 notes it before, with
    ``journal``. Collective.
    """

    def __init__(
        self,
        plan: Plan,
        done: Collection[str],
        *,
        run_dir: Path,
        world: World,
        stop: StopRequest,
        journal: Journal | None,
    ) -> None:
        left = [fault for fault in plan.faults if fault.name not in done]
        self._next: Fault | None = left[0] if left else None
        self._plan, self._run_dir = plan, run_dir
        self._world, self._stop, self._journal = world, stop, journal
        self._first: int | None = None  # step of this attempt

    def look(self, step: Step) -> None:
        """Do what is due. Returns if this process lives on."""
        first = self._first = self._first or step.number
        # a hang is one after the first step, which may take half an hour
        if self._next is None or step.number < self._next.step:
            return
        if self._next.name == planned.STOP and step.number == first:
            return
        fault, self._next = self._next, None
        if fault.name == planned.TIME_LIMIT:
            self._wait_for_warning(step.number)
            return
        if self._journal:
            self._journal.note("fault", name=fault.name, step=step.number)
        if fault.name == planned.STOP:
            beat("observe", step.number)
            time.sleep(BEAT_S)  # its heartbeat is written once a second, and says where it stands
        barrier()
        if fault.name == planned.SIGNAL:
            self._signal()
        elif fault.name == planned.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._world.all.rank == self._world.all.size - 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    def _signal(self) -> None:
        """Ask for a stop as a person would: of the job with scancel, of a local launcher by
        SIGTERM.
        """
        here = allocation()
        if here is None:
            if self._world.all.rank == 0:
                os.kill(os.getppid(), signal.SIGTERM)
        elif shutil.which("scancel"):
            if self._world.all.rank == 0:
                subprocess.run(["scancel", "--signal=USR1", here.job_id], check=False, timeout=60)
        else:  # a container without Slurm's commands
            os.kill(os.getpid(), signal.SIGUSR1)
        self._wait(time.monotonic() + LATE_S)

    def _wait_for_warning(self, step: int) -> None:
        """Return when Slurm has warned all ranks of the time limit, or should have by now."""
        owner = Fence(self._run_dir, self._world.attempt).owner()
        began = time.time()
        ends = ((owner and (owner.job_began or owner.at)) or began) + self._plan.limit_s
        in_s = max(0.0, ends - self._plan.signal_s - began)
        self._wait(time.monotonic() + in_s + LATE_S)
        if not self._journal:
            return
        now = time.time()
        came = self._stop.requested
        self._journal.note(
            "fault" if came else "warned",
            name=planned.TIME_LIMIT,
            step=step,
            seconds=round(ends - now, 1),
            words=f"waited {now - began:.0f} s",
        )

    def _wait(self, until: float) -> None:
        """Return once a stop was asked for, or at ``until`` on the monotonic clock."""
        while not self._stop.requested and time.monotonic() < until:
            beat("observe")  # no hang: it waits
            time.sleep(POLL_S)


def done_faults(run_dir: Path) -> Sequence[str]:
    """Return the names of what was done already; a warning that did not come is not waited for
    again.
    """
    return [one.name for one in planned.events(run_dir) if one.what in ("fault", "warned")]
