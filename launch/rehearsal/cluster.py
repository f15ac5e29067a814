"""A rehearsal as a job of Slurm: one submission by the user's own scripts, which goes back into the
queue by itself as often as the plan wants.

Nobody has to wait for it: the plan is in its run directory, and its last attempt judges.
"""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

from hfscale import run_files
from hfscale.config.schema import Cluster
from hfscale.log import logger
from hfscale.rehearsal.plan import events
from launch import slurm
from launch.job import Training
from launch.queue import ALIVE, client, facts, longest, seconds
from launch.request import Request

WAIT_S = 90  # at least, from the start of a job to Slurm's warning
LONG_S = 1200
POLL_S, QUIET_S = 1.0, 60.0
END_S = 60.0  # what a job gets to end
LINES = 6  # of a log
TELLING = re.compile(r"command not found|No such file|No module named|cannot allocate")
USUAL = re.compile(
    r"Exited with exit code|Terminating StepId|^\S+ (job \d+, restart|notice:)|CANCELLED AT"
)
# signals that limits of a process end in, and who sets them
LIMITED = {
    signal.SIGXFSZ: "a file may not grow so large: `ulimit -f` in slurm/site.sh",
    signal.SIGXCPU: "its time on the processor is over: `ulimit -t` in slurm/site.sh",
}
KNOWN = (  # of `scontrol show config`, what the advice looks at
    "KillWait",
    "OverTimeLimit",
    "PreemptMode",
    "PreemptType",
    "SlurmctldParameters",
    "SlurmdTimeout",
    "JobRequeue",
)


def smaller(cluster: Cluster, *, warned: bool = True) -> tuple[list[str], int]:
    """Return the overrides that make a job of ``cluster`` a short one on at most two nodes, and its
    time limit in seconds.

    If it is to be ``warned``, the limit is such that Slurm does so soon, ``cluster.signal_s``
    before it; else there is time for all.
    """
    minutes = math.ceil((cluster.signal_s + (WAIT_S if warned else LONG_S)) / 60)
    most = [limit for limit in (cluster.time, longest(cluster.partition)) if _counts(limit)]
    limits_s = [60 * minutes, *(seconds(str(limit)) for limit in most)]
    limit_s = max(limits_s[1:], default=0) if min(limits_s) <= cluster.signal_s else min(limits_s)
    nodes = min(2, cluster.nodes)
    ours = [f"cluster.nodes={nodes}", "cluster.min_nodes=null"]
    return [*ours, f"cluster.time='{math.ceil(limit_s / 60)}'"], limit_s


def _counts(limit: str | None) -> bool:
    return bool(limit) and str(limit)[0].isdigit()


def described(cluster: Cluster) -> dict[str, str]:
    """Return what Slurm says of itself and of the partition."""
    told = client(["scontrol", "show", "config"]).stdout
    pairs = (line.partition("=") for line in told.splitlines() if "=" in line)
    known = {name.strip(): value.strip() for name, _, value in pairs}
    partition = client(["scontrol", "-o", "show", "partition", *_named(cluster)]).stdout
    theirs = dict(re.findall(r"(\S+?)=(\S*)", partition.partition("\n")[0]))
    own = {name: theirs[name] for name in ("MaxTime", "GraceTime") if name in theirs}
    if theirs.get("PreemptMode") == "OFF":
        own["PreemptMode"] = "OFF"
    return {name: known[name] for name in KNOWN if name in known} | own


def _named(cluster: Cluster) -> list[str]:
    return [cluster.partition] if cluster.partition else []


@contextmanager
def submitted(request: Request) -> Iterator[Path]:
    """Yield the run directory of the job that was submitted; it does not outlive an error or Ctrl-C
    inside.
    """
    job = Training(request)
    try:
        with redirect_stdout(StringIO()):  # how a run is followed
            slurm.launch(job)
        yield job.folder
    except BaseException:
        cancel(job.folder)
        raise


def cancel(run_dir: Path) -> None:
    """Cancel what was submitted for ``run_dir``, and say what became of it."""
    for job in jobs_of(run_dir):
        client(["scancel", job])
        if _let_end(job):
            logger.info(f"job {job} is cancelled")
        else:
            logger.warning(f"job {job} may still run, Slurm does not say: scancel {job}")


def jobs_of(run_dir: Path) -> list[str]:
    """Return the jobs in the queue that work in a snapshot of ``run_dir``, as all of its launcher
    do: who was interrupted between submission and note finds them too.
    """
    queue = client(["squeue", "-h", "--me", "-o", "%A|%Z"]).stdout.splitlines()
    rows = [line.partition("|") for line in queue]
    queued = [job for job, _, folder in rows if Path(folder).is_relative_to(run_dir)]
    noted = [number(run_dir)] if (run_dir / run_files.JOB).is_file() else []
    return [*dict.fromkeys([*queued, *noted])]


def number(run_dir: Path) -> str:
    """Return the job that holds a run directory now."""
    return (run_dir / run_files.JOB).read_text().strip()


def wait(run_dir: Path, say: Callable[[str], None]) -> str:
    """Return how the job ended, "" if its last attempt has judged; meanwhile ``say`` what
    happens.
    """
    before, seen, quiet_since = "", 0, 0.0
    while True:
        job = number(run_dir)
        told = facts(job)
        state = (told or {}).get("JobState", "")
        if (run_dir / run_files.VERDICT).is_file():
            _let_end(job)
            return ""
        for event in list(events(run_dir))[seen:]:
            seen += 1
            after = f" after step {event.step}" if event.step else ""
            say(f"attempt {event.attempt}: {event.name or event.what}{after}")
        if told is not None and state not in ALIVE:
            code = how_it_left(told.get("ExitCode", ""))
            return f"job {job} ended {state or 'and is forgotten'}, {code}"
        reason = (told or {}).get("Reason", "")
        line = f"job {job}: {state.lower() or 'Slurm does not answer'}"
        if reason not in ("", "None"):
            line += f" ({reason})"
        if line != before or time.monotonic() - quiet_since > QUIET_S:
            before, quiet_since = line, time.monotonic()
            say(line)
        time.sleep(POLL_S)


def _let_end(job: str) -> bool:
    """Return whether a job has ended, once it has, or should have: until then it writes into its
    folder.
    """
    until = time.monotonic() + END_S
    while time.monotonic() < until:
        told = facts(job)
        if told is not None and told.get("JobState", "") not in ALIVE:
            return True
        time.sleep(POLL_S)
    return False


def how_it_left(told: str) -> str:
    """Return an exit code of Slurm ("2:0": code 2; "0:25": signal 25) in words, and what a signal
    is of, where few know it.
    """
    code, _, number = told.partition(":")
    if not (code.isdigit() and number.isdigit()):
        return "exit code unknown"
    ended_by = int(number) or max(0, int(code) - 128)  # a shell has the signal in its code
    if ended_by not in {*signal.Signals}:
        return f"exit code {code}"
    name = signal.Signals(ended_by)
    why = f": {LIMITED[name]}" if name in LIMITED else ""
    return f"exit code {told}, which is {name.name}{why}"


def last_words(run_dir: Path) -> str:
    """Return what the job's own log said last, without what Slurm and the launcher say of any
    job.
    """
    logs = sorted((run_dir / run_files.LOGS).glob(run_files.SLURM_LOG.format("*")))
    if not logs:
        return "it left no log"
    lines = [line.strip() for line in logs[-1].read_text(errors="replace").splitlines()]
    telling = [line for line in lines if line and not USUAL.search(line)]
    first = [line for line in telling if TELLING.search(line)][:2]  # what began it
    return " | ".join(dict.fromkeys([*first, *telling[-LINES:]])) or "it said nothing"
