"""`hfscale doctor`: one process a rank looks at its node and measures it; what they found becomes a
table.

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
from typing import Annotated

import typer

from hfscale.config.permission import grant
from hfscale.config.schema import Cluster, RunConfig
from hfscale.dist.world import (
    LISTEN_FD,
    Allocation,
    Place,
    World,
    allocation,
    available_cores,
    job_port,
    listen,
    node_name,
)
from hfscale.errors import UserError
from hfscale.reports.doctor import MARK, Finding, Work, bad_nodes, failed, judge, table
from launch import slurm
from launch.interpreter import python
from launch.job import Training
from launch.local import gpu_count
from launch.queue import client, cores_per_rank, has_slurm, ranks_per_node
from launch.request import Request
from launch.share import scripts_home

TIMEOUT_S = 40.0  # for the ranks
KILL_S = 5.0  # for them to end after that
SLURM_S = 5.0  # for Slurm to answer
RANK = "hfscale.reports.machine"
STEP = """source slurm/start.sh
SRUN+=(--overlap --kill-on-bad-exit=0 --wait=20 --ntasks-per-node=$1 --ntasks=$2)
exec "${SRUN[@]}" "${CONTAINER[@]}" "$PYTHON" -m "$3" "$4"
"""


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or a run directory. Without it: the machine alone.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value...", help="Dotted overrides.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help='Print JSON: "ok", "nodes", "bad_nodes" to leave out, "findings".'
        ),
    ] = False,
) -> None:
    """Check and measure what a run needs: this machine or, inside an allocation, each of its nodes.
    Takes less than a minute.

    The exit code is 1 if anything failed. Nodes that a job should leave out are named. Examples:
    hfscale doctor; hfscale doctor configs/pretrain/gpt2_small.yaml; hfscale doctor runs/first
    --json
    """
    grant(overrides or ())
    wanted = Training(Request(config, tuple(overrides or ()))) if config else None
    here, task = allocation(), Work()
    names = (
        client(["scontrol", "show", "hostnames", here.node_list]).stdout.split()
        if here and has_slurm()
        else []
    ) or [node_name()]
    found = [
        *_before(wanted, here, task),
        *_measure(
            wanted.folder if wanted else Path.cwd(),
            task,
            here,
            names,
            home=scripts_home(wanted.cluster if wanted else Cluster()),
        ),
    ]
    findings = judge(found, nodes=names)
    bad, ok = bad_nodes(findings), all(one.state != "fail" for one in findings)
    if as_json:
        said = {"ok": ok, "nodes": names, "bad_nodes": bad, "findings": list(map(asdict, findings))}
        print(json.dumps(said, indent=1, ensure_ascii=False))
    else:
        print(
            table(findings),
            *([f"nodes to leave out: --exclude={','.join(bad)}"] if bad else []),
            sep="\n",
        )
    raise typer.Exit(0 if ok else 1)


def _tried(check: str, look: Callable[[], Sequence[str]]) -> Finding:
    """Return what ``look`` says, as a warning if there is any, or how it fails."""
    try:
        said = look()
    except UserError as error:
        return failed(check, error)
    return Finding(check, "warn" if said else "ok", "; ".join(said) or "fits")


def _before(job: Training | None, here: Allocation | None, task: Work) -> Iterator[Finding]:
    """Yield what can be known without the ranks, of Slurm and of the config; ``task`` learns what
    they are to look at.
    """
    asked = (
        client(
            ["squeue", "-h", "-j", here.job_id, "-o", "job %i on %N, time left: %L"]
            if here
            else ["sinfo", "-h", "-o", "%P (%D nodes with %G, up to %l)"],
            timeout_s=SLURM_S,
        )
        if has_slurm()
        else None
    )
    said = (
        "; ".join((asked.stdout or asked.stderr).splitlines()) if asked else "none on this machine"
    )
    yield Finding("Slurm", "warn" if asked and asked.returncode else "ok", said)
    if job is None:
        return
    config = job.config
    # one that does not answer is none
    cluster = config.cluster
    submits = here is None and asked is not None and not asked.returncode
    if here:
        yield _tried("allocation", lambda: slurm.differences(cluster, here))
    elif submits:
        yield _tried(
            "request",
            lambda: [
                line
                for line in slurm.accepted(
                    slurm.sbatch_options(job, Path()),
                    home=scripts_home(cluster),
                    dry_run=False,
                )
                if " to start at " not in line
            ],
        )
    procs = cluster.nodes * slurm.tasks_per_node(cluster) if submits else _procs(here)
    gpus = bool(here.gpus_per_node if here else cluster.gpus_per_node if submits else gpu_count())
    yield _tried(
        "config", lambda: slurm.before(job, procs, gpus=gpus, on_nodes=bool(here or submits))
    )
    task.keep = config.checkpoint.keep_last
    if isinstance(config, RunConfig):  # labelled examples lie in a few small files
        task.shards = [source.shards for source in config.data.sources]
        task.remote = config.data.remote

    def parts() -> Sequence[str]:
        job.run.check()
        # weights and two moments in fp32
        task.checkpoint_gb = 12e-9 * job.run.shape.parameters
        return ()

    yield _tried("parts", parts)


def _procs(here: Allocation | None) -> int:
    return here.nodes * ranks_per_node(here) if here else gpu_count() or min(2, available_cores())


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


def _measure(
    place: Path,
    task: Work,
    here: Allocation | None,
    names: Sequence[str],
    *,
    home: Path,
) -> Iterator[Finding]:
    """Yield what the ranks found, and which nodes said nothing; ``home`` holds slurm/."""
    place = next(folder for folder in (place, *place.parents) if folder.is_dir())
    procs = _procs(here)
    token = place / f".hfscale-doctor-{uuid.uuid4().hex}"
    with suppress(OSError):  # `writing` will say so
        token.touch()
    task.run = str(place)
    task.token = str(token) if token.exists() else ""
    task.gpus = (here.gpus_per_node if here else gpu_count()) > 0
    text = json.dumps(asdict(task), default=str)
    try:
        if here:
            out, err = _by_srun(text, here, procs, master=names[0], home=home)
        else:
            out, err = _by_hand(text, procs, home=home)
    finally:
        with suppress(OSError):
            token.unlink()
    # a library may go on with the line
    told = [
        json.JSONDecoder().raw_decode(line, len(MARK))[0]
        for line in out.splitlines()
        if line.startswith(MARK)
    ]
    why = " / ".join(err.splitlines()[:3])
    findings = [
        Finding(**{**one, "nodes": tuple(one["nodes"]), "slow": tuple(one["slow"])}) for one in told
    ]
    yield from findings
    if silent := set(names) - {node for one in findings for node in one.nodes}:
        yield Finding("answer", "fail", f"none; {why}", nodes=tuple(silent))
    elif all(one.check != "rendezvous" for one in findings):
        yield Finding("rendezvous", "fail", f"the ranks did not meet in {TIMEOUT_S:.0f} s; {why}")


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
