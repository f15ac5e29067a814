"""Checks of what computes: that torch sees it, its memory, how fast it multiplies by precision, and
what the driver knows of its health.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from hfscale.checks.finding import NO_GPU, Finding, measured, product_rate
from hfscale.checks.node import Node
from hfscale.models.flops import peak_flops

DRIVER = Path("/proc/driver/nvidia/version")
SECONDS = 0.5  # of products in one precision, in so many turns
TURNS = 4
# by the kind of device: the size of a product, and the precisions that runs have
PRODUCTS = {"cuda": (8192, ("bf16", "fp16", "fp32")), "cpu": (768, ("fp32", "bf16"))}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of what others have. On a CPU other processes are in the way, so that a low rate proves little
SLOW = {
    ("cuda", "bf16"): (0.9, 0.75),
    ("cuda", "fp16"): (0.9, 0.75),
    ("cuda", "fp32"): (0.9, 0.75),
    ("cpu", "fp32"): (0.5, 0.0),
}
COPIED = {"cuda": 2**28, "cpu": 2**25}  # numbers of fp32
COPYING_S = 0.3
LEAST_OF_PEAK = 0.4
FREE = 0.9  # of a GPU's memory that nobody has taken
TIMEOUT_S = 10.0  # for the driver to answer
# what nvidia-smi is asked, one question each: it answers none of them if it does not know one
STATE = "temperature.gpu,clocks.sm,clocks.max.sm"
SLOWED = {
    "clocks_throttle_reasons.hw_thermal_slowdown": "it is too hot",
    "clocks_throttle_reasons.sw_thermal_slowdown": "it is too hot",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "its power supply holds it back",
}
ERRORS = {
    "ecc.errors.uncorrected.volatile.total": "memory errors that could not be corrected",
    "remapped_rows.failure": "a row of memory that could not be replaced",
    "remapped_rows.pending": "a row of memory that waits for a reset to be replaced",
}
XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")


def gpu(node: Node) -> Iterator[Finding]:
    """Yield which GPUs this node has, and their driver."""
    if not node.on_gpu:
        yield Finding("GPU", "fail" if node.task.gpus else "ok", NO_GPU)
        return
    _, total = torch.cuda.mem_get_info(node.device)
    driver = DRIVER.read_text().split("Module")[-1].split()[0] if DRIVER.is_file() else "unknown"
    kind = torch.cuda.get_device_name(node.device)
    words = f"{node.world.local_ranks} x {kind}, {total / 2**30:.0f} GiB"
    yield Finding("GPU", "ok", f"{words}, driver {driver}, CUDA {torch.version.cuda}")


def gpu_memory(node: Node) -> Iterator[Finding]:
    """Yield how much of this rank's GPU is free."""
    if not node.on_gpu:
        return
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(node.device))
    if free > FREE * total:
        yield measured("GPU memory", free, "GiB free")
        return
    words = f"GPU {node.device.index}: {total - free:.1f} of {total:.1f} GiB are taken"
    yield Finding(
        "GPU memory",
        "fail",
        words,
        remedy="`nvidia-smi` names the processes that hold it: end them",
    )


def matrix_products(node: Node) -> Iterator[Finding]:
    """Yield how fast this rank multiplies matrices, in each precision that runs have."""
    size, precisions = PRODUCTS[node.device.type]
    for precision in precisions:
        rate = _rate(size, DTYPES[precision], node.device) / 1e12
        unit = product_rate(precision)
        slow = SLOW.get((node.device.type, precision), (0.0, 0.0))
        finding = measured("matrix products", rate, unit, slow=slow)
        peak = (peak_flops(node.device, precision=precision) or 0.0) / 1e12
        if precision != "fp32" and rate < LEAST_OF_PEAK * peak:
            words = f"{rate:.3g} {unit}; its data sheet says {peak:.3g}"
            finding = Finding("matrix products", "warn", words, value=rate, unit=unit)
        yield finding


def _rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return flop/s of products of square matrices."""
    a = torch.randn(size, size, device=device).to(dtype)

    def multiply(times: int) -> float:
        begun = time.perf_counter()
        for _ in range(times):
            product = a @ a
        float(product[0, 0])  # waits for them
        return time.perf_counter() - begun

    multiply(1)
    times = max(1, min(500, int(SECONDS / TURNS / multiply(1))))
    # the best turn: in the others something else was in the way
    return 2 * size**3 * times / min(multiply(times) for _ in range(TURNS))


def memory_speed(node: Node) -> Iterator[Finding]:
    """Yield how fast this rank copies what no cache holds: bytes read and written."""
    source = torch.ones(COPIED[node.device.type], device=node.device)
    target = torch.empty_like(source)

    def copy(times: int) -> float:
        begun = time.perf_counter()
        for _ in range(times):
            target.copy_(source)
        float(target[0])  # waits for them
        return time.perf_counter() - begun

    copy(1)
    times = max(1, int(COPYING_S / TURNS / copy(1)))
    took = min(copy(times) for _ in range(TURNS)) / times
    yield measured("memory speed", 2 * source.nbytes / took / 1e9, "GB/s a rank", slow=(0.5, 0.0))


# --------------------------------------------------------------------------------------- the driver
def health(node: Node) -> Iterator[Finding]:
    """Yield what slows the GPUs of this node down, and which errors they had."""
    if shutil.which("nvidia-smi") is None:
        yield Finding("GPU health", "ok", "not readable: there is no nvidia-smi here")
        return
    if node.on_gpu:  # what slows it down shows while it works: products are queued, and go on
        a = torch.randn(8192, 8192, device=node.device, dtype=torch.bfloat16)
        for _ in range(500):
            a @ a
    slowed, broken = _asked(list(SLOWED)), _asked(list(ERRORS))
    if node.on_gpu:
        torch.cuda.synchronize(node.device)
    state = _asked(STATE.split(","))
    if state is None:
        yield Finding("GPU health", "warn", "not readable: nvidia-smi does not answer")
        return
    clocks = ", ".join(f"{row[2]} of {row[3]} MHz at {row[1]} C" for row in state)
    yield Finding("GPU health", "ok", f"clocks: {clocks}")
    yield from _complaints("clocks", slowed, SLOWED, state="warn")
    yield from _complaints("ECC", broken, ERRORS, state="fail")
    yield _xids()


def _asked(fields: Sequence[str]) -> list[list[str]] | None:
    """Return a row for each GPU: its index, and its answers to ``fields``; None without one."""
    query = f"--query-gpu={','.join(['index', *fields])}"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return rows_of(done.stdout) if done.returncode == 0 else None


def rows_of(text: str) -> list[list[str]]:
    """Return the fields of each line of nvidia-smi's csv."""
    return [[field.strip() for field in line.split(",")] for line in text.splitlines() if line]


def _complaints(
    what: str, rows: list[list[str]] | None, meanings: dict[str, str], *, state: str
) -> Iterator[Finding]:
    if rows is None:
        yield Finding("GPU health", "ok", f"{what}: not readable")
        return
    for line in complaints(rows, list(meanings.values())):
        yield Finding("GPU health", "fail" if state == "fail" else "warn", line)


def complaints(rows: Sequence[Sequence[str]], meanings: Sequence[str]) -> list[str]:
    """Return what is wrong with each GPU. A field is a count, or says "Active" or "Yes"; one that
    the GPU does not have ("[N/A]") says nothing.
    """
    lines = []
    for index, *fields in rows:
        for field, meaning in zip(fields, meanings, strict=True):
            wrong = field in ("Active", "Yes") or (field.isdigit() and int(field) > 0)
            line = f"GPU {index}: {meaning}"
            if wrong and line not in lines:
                lines.append(line)
    return lines


def _xids() -> Finding:
    """Return the errors of GPUs that the kernel's log holds, where this user may read it."""
    try:
        done = subprocess.run(
            ["dmesg"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("GPU health", "ok", f"Xid: not readable: {error}")
    if done.returncode:
        return Finding("GPU health", "ok", "Xid: not readable: dmesg needs more rights here")
    errors = xids_of(done.stdout)
    if errors:
        return Finding("GPU health", "warn", f"Xid since the node started: {'; '.join(errors)}")
    return Finding("GPU health", "ok", "Xid: none since the node started")


def xids_of(log: str) -> list[str]:
    """Return how often each error of each GPU stands in the kernel's ``log``."""
    counts: dict[tuple[str, str], int] = {}
    for place, number in XID.findall(log):
        counts[place, number] = counts.get((place, number), 0) + 1
    return [f"{number} ({place}, {count}x)" for (place, number), count in counts.items()]
