"""One rank of `hfscale doctor`: looks at its node and measures it, a second or so for each thing,
and prints a line a finding.

    python -m hfscale.reports.machine '{"run": FOLDER, ...}'
        run             the run directory, or the nearest folder above it that is there
        token           a file that was just written there
        shards, remote  manifests, and how they are fetched from a URL
        checkpoint_gb, keep  what a checkpoint takes, and how many are kept
        gpus            whether each rank should have one

Nothing is gathered over the network, so that a node with a broken network is heard too; the ranks
meet last. Lines on stdout that begin with MARK are findings, all others are of libraries.
"""

from __future__ import annotations

import configparser
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as torch_dist
from packaging.requirements import Requirement

from hfscale.dist import group
from hfscale.dist.agree import from_all_ranks
from hfscale.dist.world import World, node_name
from hfscale.engine.ops import compatible_ops
from hfscale.errors import DataError
from hfscale.models.flops import peak_flops
from hfscale.records import parse
from hfscale.reports.doctor import MARK, Finding, Work, failed
from hfscale.shards.files import flock
from hfscale.shards.open import open_manifest

# of what is read or written, whichever comes first
SECONDS = 1.0
FILE_BYTES = 2**26
PIECE = 2**23  # bytes at once
SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"
DRIVER, MEMORY = Path("/proc/driver/nvidia/version"), Path("/proc/meminfo")


def _measured(
    check: str,
    value: float,
    unit: str,
    *,
    least: float = 0.0,
    slow: tuple[float, float] = (0.0, 0.0),
) -> Finding:
    state, words = (
        ("warn", f"{value:.3g} {unit}; usual are {least:.3g} and more")
        if value < least
        else ("ok", "")
    )
    return Finding(check, state, words, value=value, unit=unit, slow=slow)


def packages(task: Work, world: World) -> Iterator[Finding]:
    setup = configparser.ConfigParser()
    asked = (
        setup["options"]["install_requires"].split("\n")
        if setup.read(SETUP)
        else metadata.requires("hfscale") or []
    )
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
    main = ", ".join(
        f"{name} {there[name]}" for name in ("torch", "deepspeed", "transformers") if name in there
    )
    words = f"Python {platform.python_version()}, {main}; all {len(there)} are in range"
    yield Finding("packages", "fail" if wrong else "ok", "; ".join(wrong) or words)


def deepspeed(task: Work, world: World) -> Iterator[Finding]:
    ops = compatible_ops()
    can, cannot = (
        ", ".join(name for name in ops if ops[name] is one) or "none" for one in (True, False)
    )
    yield Finding(
        "deepspeed", "ok", f"kernels that could be compiled: {can}; that could not: {cannot}"
    )


def gpu(task: Work, world: World) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", "fail" if task.gpus else "ok", "torch sees none")
        return
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(world.local_rank))
    driver = DRIVER.read_text().split("Module")[-1].split()[0] if DRIVER.is_file() else "unknown"
    kind = f"{world.local_ranks} x {torch.cuda.get_device_name(world.local_rank)}, {total:.0f} GiB"
    yield Finding("GPU", "ok", f"{kind}, driver {driver}, CUDA {torch.version.cuda}")
    taken = f"GPU {world.local_rank}: {total - free:.1f} GiB are taken"
    yield Finding(
        "GPU memory", "ok" if free > 0.9 * total else "fail", taken, value=free, unit="GiB free"
    )


def memory(task: Work, world: World) -> Iterator[Finding]:
    free = next(
        int(line.split()[1]) / 2**20
        for line in MEMORY.read_text().split("\n")
        if line.startswith("MemAvailable")
    )
    yield _measured("memory", free, "GiB free a node", least=2.0 * world.local_ranks)


def matrix_products(task: Work, world: World) -> Iterator[Finding]:
    device = (
        torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    )
    size, dtype, count = (
        (8192, torch.bfloat16, 100) if device.type == "cuda" else (1024, torch.float32, 5)
    )
    a = torch.randn(size, size, device=device).to(dtype)
    rate = 2 * size**3 / 1e12 / _seconds(lambda: float((a @ a)[0, 0]), count)
    # on a CPU other processes of the node are in the way, so that a low rate proves nothing
    yield _measured(
        "matrix products",
        rate,
        f"TFLOP/s a rank, {a.dtype}",
        least=0.4e-12 * (peak_flops(device, precision="bf16") or 0.0),
        slow=(0.9, 0.75) if device.type == "cuda" else (0.5, 0.0),
    )


def _seconds(act: Callable[[], object], count: int) -> float:
    """Return how long one of ``count`` acts takes, after one in advance."""
    act()
    begun = time.perf_counter()
    for _ in range(count):
        act()
    return (time.perf_counter() - begun) / count


def _limit(kind: int) -> float:
    """Return what the system allows of ``kind`` (``resource.RLIMIT_...``)."""
    soft, _ = resource.getrlimit(kind)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def limits(task: Work, world: World) -> Iterator[Finding]:
    files, locked = _limit(resource.RLIMIT_NOFILE), _limit(resource.RLIMIT_MEMLOCK)
    state = "ok"
    if files < 4096:
        state = "fail" if files < 512 else "warn"
    yield Finding("open files", state, f"at most {files}")
    over_network = torch.cuda.is_available() and world.all.size > world.local_ranks
    yield Finding(
        "locked memory",
        "warn" if over_network and locked < float("inf") else "ok",
        f"at most {locked / 2**20:.3g} MiB",
    )


def disk(task: Work, world: World) -> Iterator[Finding]:
    if task.token:
        seen = Path(task.token).is_file()
        yield Finding(
            "shared files",
            "ok" if seen else "fail",
            f"what was just written to {task.run} is {'' if seen else 'not '}there",
        )
    room, need = os.statvfs(task.run), task.checkpoint_gb
    free = room.f_bavail * room.f_frsize / 1e9
    wants = (
        f"; a checkpoint takes about {need:.3g} GB, {task.keep} are kept and one is in the making"
        if need
        else ""
    )
    state = (
        "fail" if free < max(2 * need, 0.25) else "warn" if free < (task.keep + 1) * need else "ok"
    )
    yield Finding(
        "free space",
        state,
        f"{free:.3g} GB in {task.run}{wants}",
        value=free,
        unit=f"GB in {task.run}{wants}",
    )
    # some file systems count none
    yield _measured("inodes", room.f_favail if room.f_files else float("inf"), "free", least=10_000)


def locks(task: Work, world: World) -> Iterator[Finding]:
    """Yield whether the run's file system has locks, which keep two launchers out of one run
    directory.
    """
    try:
        with tempfile.TemporaryFile(dir=task.run) as file:
            has = flock(file, wait=False)
    except OSError:  # `writing` says why
        return
    yield Finding("locks", "ok" if has else "warn", f"{task.run} has {'' if has else 'no '}locks")


def writing(task: Work, world: World) -> Iterator[Finding]:
    file = Path(task.run) / f".hfscale-doctor-{node_name()}-{os.getpid()}"
    block = os.urandom(PIECE)
    done = 0
    begun = time.perf_counter()
    try:
        with open(file, "xb", buffering=0) as stream:
            while done < FILE_BYTES and time.perf_counter() < begun + SECONDS:
                done += stream.write(block)
                os.fsync(stream.fileno())
        yield _measured(
            "writing",
            done / 1e6 / (time.perf_counter() - begun),
            "MB/s a node",
            least=20.0,
            slow=(0.3, 0.0),
        )
    finally:
        file.unlink(missing_ok=True)


def reading(task: Work, world: World) -> Iterator[Finding]:
    done, took = 0, 0.0
    for manifest in (open_manifest(path, **task.remote) for path in task.shards):
        sizes = (
            {}
            if manifest.remote
            else {entry.name: entry.stat().st_size for entry in os.scandir(manifest.folder)}
        )
        if sizes and (
            wrong := [
                one.name
                for one in manifest.shards
                if sizes.get(one.name) != one.bytes or one.index_name not in sizes
            ]
        ):
            raise DataError(
                f"{len(wrong)} of {len(manifest.shards)} shards are missing or have another size",
                where=manifest.folder,
                value=", ".join(wrong[:3]),
                remedy="restore them from a copy, or build the shards again",
            )
        shard, begun = manifest.shards[world.all.rank % len(manifest.shards)], time.perf_counter()
        if manifest.remote:
            done += manifest.remote.sample(shard)
        else:
            with open(manifest.folder / shard.name, "rb", buffering=0) as stream:
                # from the disk, not from memory
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while time.perf_counter() < begun + SECONDS / len(task.shards) and (
                    block := stream.read(PIECE)
                ):
                    done += len(block)
        took += time.perf_counter() - begun
    if took:
        yield _measured("reading", done / 1e6 / took, "MB/s a rank", least=10.0, slow=(0.3, 0.0))


def rendezvous(task: Work, world: World) -> Iterator[Finding]:
    """Yield what takes all ranks: that they meet, how fast they sum, and how far their clocks are
    apart.
    """
    device = group.start(world)
    group.barrier()
    yield Finding(
        "rendezvous", "ok", f"{world.all.size} ranks at {world.master_addr}:{world.master_port}"
    )
    if world.all.size > 1:
        tensor = torch.ones(2**25 if device.type == "cuda" else 2**22, device=device)
        # the second waits for the first
        took = _seconds(lambda: (torch_dist.all_reduce(tensor), float(tensor[0])), 5)
        moved = 2 * (world.all.size - 1) / world.all.size * tensor.numel() * tensor.element_size()
        yield _measured(
            "all-reduce",
            moved / took / 1e9,
            "GB/s (bus bandwidth)",
            least=4.0 if device.type == "cuda" else 0.0,
        )
        group.barrier()
        times = from_all_ranks(time.time())
        off = round(abs(times[world.all.rank] - times[0]), 2)
        yield Finding(
            "clocks",
            "fail" if off > 30 else "warn" if off > 1 else "ok",
            f"{off:.1f} s apart",
            value=off,
            unit="s apart",
        )
    group.shutdown()


A_NODE = (packages, deepspeed, memory, limits, disk, locks, writing)  # the others for each rank
CHECKS = (
    packages,
    gpu,
    memory,
    matrix_products,
    deepspeed,
    limits,
    disk,
    locks,
    writing,
    reading,
    rendezvous,
)


def main() -> None:
    """Print the findings of this rank."""
    task, world = parse(Work, sys.argv[1]), World.from_environment()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints that it found none

    def say(finding: Finding) -> None:
        print(f"\n{MARK}{json.dumps(asdict(replace(finding, nodes=(node_name(),))))}", flush=True)

    for check in CHECKS:
        if world.local_rank == 0 or check not in A_NODE:
            try:
                for finding in check(task, world):
                    say(finding)
            except (
                Exception
            ) as error:  # whatever a broken machine makes of a check: the others go on
                say(failed(check.__name__.replace("_", " "), error))


if __name__ == "__main__":
    main()
