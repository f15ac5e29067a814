"""What the losses of tokens cost with all logits of a micro-batch and with those of a chunk at a
time: memory, time, and how far the two are apart.

    python -m benchmarks.head [--repeats 5] [--tokens 4096 --vocabulary 128256 --width 512]

Each measurement is a process of its own: hidden states and a head, forward and backward, by torch
on one thread. Memory is the most that is resident above what was before; on a GPU
(`benchmarks/gpu.md`) what torch's allocator held. Time is processor time, on a GPU that of the
device. Targets: losses within 1e-6, memory at most 0.17 and time at most 1.3 of the plain head's.
Five minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict
from hfscale.models.head import After
from hfscale.objectives.chunked_head import Question, chunked
from hfscale.objectives.cross_entropy import IGNORE_INDEX, token_losses

MIB = 2**20
WAYS = ("plain", "chunked")
CASES = {  # dtype, part of the tokens that is asked
    "fp32": (torch.float32, 1.0),
    "bf16": (torch.bfloat16, 1.0),
    "fp32, 15 % of the tokens asked": (torch.float32, 0.15),
}
MOST = {"fp32": 1e-6, "bf16": 1e-3}  # of the mean loss


def resident(key: str) -> float:
    """Return a size in /proc/self/status, in MiB."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


class Meter:
    """Memory and time of what is done inside."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib = self.s = 0.0

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / MIB
            self._begin = time.perf_counter()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._before, self._begin = resident("VmRSS"), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.s = time.perf_counter() - self._begin
            self.mib = torch.cuda.max_memory_allocated() / MIB - self._before
        else:
            self.s = time.process_time() - self._begin
            self.mib = resident("VmHWM") - self._before


def losses_of(way: str, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """Return ``losses_N``."""
    if way == "plain":
        return token_losses(F.linear(hidden_NH, weight_VH), labels_N)
    return chunked(hidden_NH, weight_VH, None, labels_N, Question(After()))[0]


def measure(way: str, case: str, args: argparse.Namespace) -> dict[str, float]:
    """Return what a forward and a backward pass took and gave, in this process."""
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype, asked = CASES[case]
    rng = torch.Generator().manual_seed(0)
    shapes = (args.tokens, args.width), (args.vocabulary, args.width)
    hidden_NH, weight_VH = (torch.randn(shape, generator=rng) for shape in shapes)
    hidden_NH = hidden_NH.to(device, dtype).requires_grad_()
    weight_VH = (weight_VH * 0.02).to(device, dtype).requires_grad_()
    labels_N = torch.randint(args.vocabulary, (args.tokens,), generator=rng)
    labels_N[torch.rand(args.tokens, generator=rng) >= asked] = IGNORE_INDEX
    labels_N = labels_N.to(device)
    few = hidden_NH[:64], weight_VH, labels_N[:64]
    torch.autograd.grad(losses_of(way, *few).sum(), [hidden_NH, weight_VH])  # what is loaded once
    count = int((labels_N != IGNORE_INDEX).sum())
    with Meter(device) as meter:
        loss = losses_of(way, hidden_NH, weight_VH, labels_N).sum() / count
        loss.backward()
    assert hidden_NH.grad is not None
    assert weight_VH.grad is not None
    norms = [float(one.grad.float().norm()) for one in (hidden_NH, weight_VH)]
    return {"mib": meter.mib, "s": meter.s, "loss": float(loss), "h": norms[0], "w": norms[1]}


def child(way: str, case: str, kept: list[dict[str, Any]]) -> float:
    """Return the seconds of a measurement in a process of its own, which is kept."""
    command = [sys.executable, "-m", "benchmarks.head", *sys.argv[1:], "--one", way, case]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kept.append(json.loads(out.splitlines()[-1]))
    return float(kept[-1]["s"])


def row(case: str, kept: dict[str, list[dict[str, Any]]]) -> tuple[list[str], list[str]]:
    """Return a line of the table, and the verdicts on it."""
    mib, s = ({way: [one[key] for one in kept[way]] for way in WAYS} for key in ("mib", "s"))
    plain, seen = (kept[way][0] for way in WAYS)
    off = {key: abs(seen[key] / plain[key] - 1) for key in ("loss", "h", "w")}
    less, slower = ratio(mib["chunked"], mib["plain"]), ratio(s["chunked"], s["plain"])
    cells = [case, *(spread(mib[way], form="{:.0f}") for way in WAYS), f"{less:.3f}"]
    cells += [*(spread(s[way]) for way in WAYS), f"{slower:.2f}"]
    cells += [f"{off['loss']:.0e}, {max(off['h'], off['w']):.0e}"]
    verdicts = [
        f"{case}: memory {less:.3f} {verdict(less, at_most=0.17)}, "
        f"time {slower:.2f} {verdict(slower, at_most=1.3)}, "
        f"loss {off['loss']:.0e} {verdict(off['loss'], at_most=MOST[case[:4]])}"
    ]
    return cells, verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args)))
        return
    about, rows, verdicts = machine("torch"), [], []
    for case in args.cases:
        kept: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        candidates: dict[str, Callable[[], float]] = {
            way: partial(child, way, case, kept[way]) for way in WAYS
        }
        interleaved(candidates, repeats=args.repeats)
        cells, lines = row(case, kept)
        rows.append(cells)
        verdicts += lines
    header = [
        "",
        "plain, MiB",
        "chunked, MiB",
        "ratio",
        "plain, s",
        "chunked, s",
        "ratio",
        "off by",
    ]
    size = f"{args.tokens:,} tokens x {args.vocabulary:,} ids, width {args.width}, {args.device}"
    notes = "Off by: the mean loss, and the larger of the norms of both gradients, relative."
    body = [about, f"{size}. Most memory above the start; forward and backward. {notes}"]
    section = "head" if args.device == "cpu" else f"head ({args.device})"
    record(section, "\n\n".join([*body, table(header, rows), "\n".join(verdicts)]))


if __name__ == "__main__":
    main()
