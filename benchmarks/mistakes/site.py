"""Mistakes in what a job asks Slurm for, in the script, and in what the site sets before Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.mistakes.config import put
from benchmarks.mistakes.place import Mistake, Place


def sbatch(name: str, value: Any) -> Callable[[Place], None]:
    """Return what adds an option of sbatch."""
    return lambda place: place.values["cluster"]["sbatch"].update({name: value})


def site(line: str) -> Callable[[Place], None]:
    """Return what adds a line to site.sh."""
    return lambda place: place.add(line)


def script(old: str, new: str) -> Callable[[Place], None]:
    """Return what changes train.sbatch."""
    return lambda place: place.replace(place.script, old, new)


def version(package: str, number: str) -> Callable[[Place], None]:
    """Return what lets the jobs find another version of a package than this machine has."""

    def make(place: Place) -> None:
        folder = place.folder / "old" / f"{package}-{number}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n"
        )
        place.add(f"export PYTHONPATH={place.folder}/old:$PYTHONPATH")

    return make


def many_nodes(place: Place) -> None:
    """More than there are, among which the batch divides."""
    place.values["cluster"]["nodes"] = 8
    place.values["train"]["global_batch"] = 32


CLUSTER = [
    Mistake("no such partition", put("cluster.partition", "gpus"), ("partition",)),
    Mistake("too many nodes", many_nodes, ("--nodes=8",)),
    Mistake("too many GPUs", put("cluster.gpus_per_node", 8), ("--gpus-per-node=8",)),
    Mistake("too long", put("cluster.time", "3-00:00:00"), ("time", "limit")),
    Mistake("no time to train", put("cluster.time", "1"), ("cluster.time",)),
    Mistake("a time that is none", put("cluster.time", "two days"), ("cluster.time",)),
    Mistake("an account that is not ours", put("cluster.account", "overdrawn"), ("account",)),
    Mistake("no such option", sbatch("gpus-a-node", 2), ("gpus-a-node",)),
    Mistake("an array", sbatch("array", "0-3"), ("cluster.sbatch.array",)),
    Mistake("no such constraint", sbatch("constraint", "h100"), ("constraint", "feature")),
    Mistake("too much memory", sbatch("mem", "900G"), ("memory", "--mem")),
    Mistake("no such node", sbatch("nodelist", "n17"), ("nodelist", "node name", "n17")),
    Mistake("all nodes left out", sbatch("exclude", "n1,n2,n3,n4"), ("exclude", "nodes")),
    Mistake("no such reservation", sbatch("reservation", "mine"), ("reservation",)),
    Mistake("too many cores", sbatch("cpus-per-task", 64), ("cpus-per-task", "CPU")),
    Mistake("ranks that do not divide", sbatch("ntasks-per-node", 3), ("global_batch",)),
    Mistake("no such kind of GPU", sbatch("gres", "gpu:b200:1"), ("gres",)),
]
SITE = [
    Mistake("an open quote in site.sh", site("export A='x"), ("site.sh",)),
    Mistake("site.sh exits", site("exit 3"), ("exit code 3",)),
    Mistake("an environment that is not there", site("PYTHON=/nowhere/bin/python"), ("/nowhere",)),
    Mistake(
        "a Python without packages",
        site("unset PYTHONPATH; PYTHON=/usr/bin/python3"),
        ("No module named",),
    ),
    Mistake("no apptainer", site("CONTAINER=(apptainer exec --nv x.sif)"), ("apptainer",)),
    Mistake("pyxis is not installed", site("CONTAINER=(--container-image=x.sqsh)"), ("container",)),
    Mistake("no memory", site("ulimit -v 400000"), ("emory", "failed to map", "allocate")),
    Mistake("few files", site("ulimit -n 16"), ("open files", "open any more files")),
    Mistake("a network that is not there", site("export GLOO_SOCKET_IFNAME=ib7"), ("ib7",)),
    Mistake("threads that are no number", site("export OMP_NUM_THREADS=x"), ("OMP_NUM_THREADS",)),
    Mistake("a home of Python", site("export PYTHONHOME=/nowhere"), ("PYTHONHOME", "encodings")),
    Mistake("files of no size", site("ulimit -f 0"), ("File too large", "XFSZ")),
    Mistake("an old deepspeed", version("deepspeed", "0.15.0"), ("deepspeed",)),
    Mistake("an old transformers", version("transformers", "4.30.0"), ("transformers",)),
    Mistake("an old torch", version("torch", "1.13.0"), ("torch",)),
    Mistake("an empty PATH", site("export PATH=/nowhere"), ("command not found", "no Python")),
]
SCRIPT = [
    Mistake("no start.sh", lambda p: (p.folder / "slurm/start.sh").unlink(), ("start.sh",)),
    Mistake("no train.sbatch", lambda p: p.script.unlink(), ("train.sbatch",)),
    Mistake("an open if", script("code=0\n", "code=0; if true; then\n"), ("syntax error",)),
    Mistake("it does not come back", script("again=\n", 'exit "$code"\n'), ("did not go on",)),
    Mistake(
        "the code of the ranks is lost",
        script('"${ranks[@]}" || code=$?', '"${ranks[@]}" || true'),
        ("did not go on",),
    ),
    Mistake(
        "one rank in place of all",
        script("--ntasks=$((nodes * tasks)) --kill", "--ntasks=1 --kill"),
        ("ranks", "ntasks"),
    ),
    Mistake("no port", script("cores MASTER_PORT attempt", "cores PORT attempt"), ("MASTER_PORT",)),
    Mistake("no shebang", script("#!/bin/bash\n", "bash\n"), ("#!", "shell")),
]
MISTAKES = [*CLUSTER, *SITE, *SCRIPT]
