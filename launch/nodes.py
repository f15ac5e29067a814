"""One process a rank on the nodes of an allocation, or on this machine, which looks at its node and
says what it finds: what `hfscale doctor` hears.

On this machine they are plain processes; inside an allocation they are one step of srun, with what
slurm/site.sh sets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from hfscale.checks.finding import MARK, Finding
from hfscale.checks.node import Task
from hfscale.checks.places import existing
from hfscale.dist.world import (
    LISTEN_FD,
    Allocation,
    Place,
    World,
    available_cores,
    job_port,
    listen,
)
from hfscale.records import parse
from launch.interpreter import python
from launch.queue import cores_per_rank, ranks_per_node

TIMEOUT_S = 45.0  # for the ranks
KILL_S = 5.0  # for them to end after that
RANK = "hfscale.checks.node"
STEP = """source slurm/start.sh
SRUN+=(--overlap --kill-on-bad-exit=0 --wait=20 --ntasks-per-node=$1 --ntasks=$2)
exec "${SRUN[@]}" "${CONTAINER[@]}" "$PYTHON" -m "$3" "$4"
"""


def measure(
    folder: Path,
    task: Task,
    *,
    here: Allocation | None,
    names: Sequence[str],
    procs: int,
    home: Path,
) -> Iterator[Finding]:
    """Yield what ``procs`` ranks find, and which of the nodes ``names`` say nothing. They write to
    ``folder``, or the nearest one above it; ``home`` holds slurm/.
    """
    place = existing(folder)
    token = place / f".hfscale-doctor-{uuid.uuid4().hex}"
    with suppress(OSError):  # `writing` will say so
        token.touch()
    task.folder = str(place)
    task.token = str(token) if token.exists() else ""
    text = json.dumps(asdict(task), default=str)
    try:
        if here:
            out, err = _by_srun(text, here, procs, master=names[0], home=home)
        else:
            out, err = _by_hand(text, procs, home=home)
    finally:
        with suppress(OSError):
            token.unlink()
    findings = list(heard(out))
    yield from findings
    why = " / ".join(err.splitlines()[:3])
    silent = set(names) - {node for one in findings for node in one.nodes}
    if silent:
        yield Finding("answer", "fail", f"none; {why}", nodes=tuple(silent))
    elif all(one.check != "rendezvous" for one in findings):
        yield Finding("rendezvous", "fail", f"the ranks did not meet in {TIMEOUT_S:.0f} s; {why}")


def heard(out: str) -> Iterator[Finding]:
    """Yield the findings in what ranks wrote."""
    for line in out.splitlines():
        if line.startswith(MARK):
            # a library may go on with the line
            _, end = json.JSONDecoder().raw_decode(line, len(MARK))
            yield parse(Finding, line[len(MARK) : end])


def _await(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Return when all have ended, or were asked to (srun ends its ranks), and have had some time
    for it.
    """
    until = time.monotonic() + TIMEOUT_S
    try:
        for rank in ranks:
            rank.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        for rank in ranks:
            rank.terminate()
        with suppress(subprocess.TimeoutExpired):
            for rank in ranks:
                rank.wait(KILL_S)


def _by_srun(
    text: str, here: Allocation, procs: int, *, master: str, home: Path
) -> tuple[str, str]:
    """Return what the ranks on the nodes of the allocation say, on stdout and stderr."""
    a_node = ranks_per_node(here)
    env = {
        "MASTER_ADDR": master,
        "MASTER_PORT": str(job_port(here.job_id)),
        "HFSCALE_PYTHON": sys.executable,
        "SRUN_CPUS_PER_TASK": str(cores_per_rank(here, a_node)),  # as training has it
    }
    command = ["bash", "-c", STEP, "bash", str(a_node), str(procs), RANK, text]
    return _output(command, [env], home=home)


def _by_hand(text: str, procs: int, *, home: Path) -> tuple[str, str]:
    """Return what ranks on this machine say, on stdout and stderr."""
    threads = str(max(1, available_cores() // procs))
    with listen() as listener:
        port = listener.getsockname()[1]
        worlds = (World(Place(rank, procs), rank, procs, master_port=port) for rank in range(procs))
        places = [world.export() | {"OMP_NUM_THREADS": threads} for world in worlds]
        places[0] |= {LISTEN_FD: str(listener.fileno())}
        return _output(python(RANK, text), places, home=home, started=listener.close)


def _output(
    command: Sequence[str],
    places: Sequence[dict[str, str]],
    *,
    home: Path,
    started: Callable[[], None] = lambda: None,
) -> tuple[str, str]:
    """Return what processes of ``command``, one in each of the environments ``places``, write until
    their time is over; ``started`` is called once all run.
    """
    # files: a pipe would be held by ranks that nothing can end
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        ranks = [
            subprocess.Popen(
                command,
                cwd=home,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=out.open("a"),  # a line is one write, and goes to the end
                stderr=err.open("a"),
                pass_fds=[int(env[LISTEN_FD])] if LISTEN_FD in env else [],
            )
            for env in places
        ]
        started()
        try:
            _await(ranks)
        finally:
            for rank in ranks:
                rank.kill()
        return out.read_text(errors="replace"), err.read_text(errors="replace")
