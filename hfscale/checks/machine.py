"""Checks of a node: what is installed, memory, limits."""

from __future__ import annotations

import configparser
import os
import platform
import resource
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from hfscale.checks.finding import Finding, measured
from hfscale.checks.node import Node

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"
MEMORY = Path("/proc/meminfo")
CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
SHARED = Path("/dev/shm")
MAIN = ("torch", "deepspeed", "transformers")


def packages(node: Node) -> Iterator[Finding]:
    """Yield which of the packages that setup.cfg asks for are out of its ranges."""
    yield look_at_packages()


def look_at_packages() -> Finding:
    """Return it for the Python of this process."""
    setup = configparser.ConfigParser()
    if setup.read(SETUP):
        asked = setup["options"]["install_requires"].split("\n")
    else:
        asked = metadata.requires("hfscale") or []
    wanted = [
        one
        for one in map(Requirement, filter(None, asked))
        if one.marker is None or one.marker.evaluate({"extra": ""})
    ]
    there = {one.name: metadata.version(one.name) for one in wanted}
    wrong = [
        f"{one.name} {there[one.name]}, not {one.specifier}"
        for one in wanted
        if not one.specifier.contains(there[one.name].partition("+")[0], prereleases=True)
    ]
    main = ", ".join(f"{name} {there[name]}" for name in MAIN if name in there)
    words = f"Python {platform.python_version()}, {main}; all {len(there)} are in range"
    return Finding("packages", "fail" if wrong else "ok", "; ".join(wrong) or words)


def deepspeed(node: Node) -> Iterator[Finding]:
    """Yield which of DeepSpeed's kernels this node could compile."""
    from hfscale.engine.ops import compatible_ops  # slow to import

    ops = compatible_ops()
    can, cannot = (
        ", ".join(name for name in ops if ops[name] is one) or "none" for one in (True, False)
    )
    words = f"kernels that could be compiled: {can}; that could not: {cannot}"
    yield Finding("deepspeed", "ok", words)


def memory(node: Node) -> Iterator[Finding]:
    """Yield what this job may still take of the node's memory."""
    yield measured("memory", free_memory() / 2**30, "GiB free a node")


def free_memory() -> int:
    """Return how many bytes this process may still take: what the machine has, or what its control
    group (of a container, of a job of Slurm) leaves.
    """
    lines = MEMORY.read_text().split("\n")
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    own = next((line for line in CGROUP.read_text().split("\n") if line.startswith("0::")), "")
    group = CGROUPS / own.removeprefix("0::").strip("/")
    for folder in (group, *group.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
            free = min(free, int(most) - int(used.read_text()))
    return max(0, free)


def shared_memory(node: Node) -> Iterator[Finding]:
    """Yield how much room there is where the ranks of a node share memory."""
    if not SHARED.is_dir():
        yield Finding("shared memory", "warn", f"there is no {SHARED}")
        return
    room = os.statvfs(SHARED)
    yield measured("shared memory", room.f_bavail * room.f_frsize / 2**30, f"GiB free in {SHARED}")


def open_files(node: Node) -> Iterator[Finding]:
    """Yield how many files a process may have open."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        yield Finding("open files", "ok", "any number")
    else:
        yield Finding("open files", "ok", f"at most {most}", value=float(most))


def threads(node: Node) -> Iterator[Finding]:
    """Yield how many threads a rank is to have: what is no number OpenMP takes for all cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").strip()
    numbers = all(part.isdigit() and int(part) for part in asked.split(",") if asked)
    words = f"OMP_NUM_THREADS is {asked or 'not set'}"
    yield Finding("threads", "ok" if numbers else "fail", words)


def file_size(node: Node) -> Iterator[Finding]:
    """Yield how large a file may become."""
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most == resource.RLIM_INFINITY:
        yield Finding("file size", "ok", "any size")
    else:
        yield Finding("file size", "ok", f"at most {most / 1e9:.3g} GB", value=most / 1e9)


def locked_memory(node: Node) -> Iterator[Finding]:
    """Yield how much memory the network may lock, where it is used."""
    most, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    over_network = node.on_gpu and node.world.all.size > node.world.local_ranks
    if most == resource.RLIM_INFINITY:
        yield Finding("locked memory", "ok", "any amount")
    else:
        words = f"at most {most / 2**20:.3g} MiB"
        yield Finding("locked memory", "warn" if over_network else "ok", words)
