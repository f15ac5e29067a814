"""A rehearsal on this machine: the user's own command, started again each time it ends, as Slurm
would.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hfscale.errors import EXIT_DONE, EXIT_HUNG, EXIT_STOPPED
from hfscale.monitor.fence import newest
from hfscale.rehearsal.plan import FAULTS
from launch.local import die_with

TRIES = len(FAULTS) + 3
ASKED_S, END_S = 1.0, 30.0  # what ranks get to end after the first Ctrl-C, and the second
SAID = "hfscale.log"  # what the commands of all attempts have printed


def rehearse_here(command: Sequence[str], run_dir: Path) -> str:
    """Return how the run ended, "" if it is done: ``command`` is started until then."""
    with open(run_dir.parent / SAID, "ab") as log:
        for _ in range(TRIES):
            code = _attempt(command, log.fileno())
            if code == EXIT_DONE:
                return ""
            again = code in (EXIT_STOPPED, EXIT_HUNG) or code < 0 or code >= 128
            if not again:
                return f"attempt {_number(run_dir)} ended with code {code}: {_last(run_dir)}"
    return f"it was not done after {TRIES} attempts"


def _attempt(command: Sequence[str], log: int) -> int:
    """Return the code of one attempt; nothing of it outlives this process, or Ctrl-C."""
    rehearsal = os.getpid()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=lambda: die_with(rehearsal),
    ) as process:
        try:
            return process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            process.kill()  # its ranks go with it


def _end(process: subprocess.Popen[bytes]) -> None:
    """End an attempt as two Ctrl-C do: nothing of it is kept, so that its save is not waited for;
    the second one kills the ranks with all that they have started.
    """
    for wait_s in (ASKED_S, END_S):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)


def _number(run_dir: Path) -> int:
    attempt = newest(run_dir)
    return attempt.number if attempt else 0


def _last(run_dir: Path) -> str:
    """Return what was said last, from where an error begins."""
    lines = (run_dir.parent / SAID).read_text(errors="replace").splitlines()
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return " ".join(line.strip() for line in lines[told[-1] if told else -3 :])
