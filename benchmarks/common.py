"""What the benchmarks share: interleaved repeats, medians, the machine in words, and sections of
``RESULTS.md``.

A benchmark measures its candidates in turns (a, b, c, a, b, c, ...), because a machine's speed
drifts by more than the differences that matter; it compares them by the median of the ratios of
each turn, and writes what it printed.

    # a callable returns one measurement
    times = interleaved({"ours": run_ours, "peer": run_peer}, repeats=7)
    body = table(["", "s"], [[name, f"{median(t):.3f}"] for name, t in times.items()])
    record("shards_build", body)  # replaces this section of RESULTS.md only
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = """# Results

What the scripts in this folder printed, each section by the script that names it (`python -m
benchmarks.NAME`), which replaces it. Ratios come from one run, candidates measured in turns;
figures are medians, with the quartiles beside them.
"""


def interleaved(
    candidates: Mapping[str, Callable[[], float]], *, repeats: int, warm: int = 0
) -> dict[str, list[float]]:
    """Return ``repeats`` measurements of each candidate, taken in turns; each turn starts with
    another candidate.

    ``warm`` turns come before and are thrown away. Progress goes to stderr.
    """
    names = list(candidates)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            value = candidates[name]()
            if turn >= 0:
                taken[name].append(value)
            print(f"  turn {turn + 1}/{repeats}  {name}: {value:.6g}", file=sys.stderr, flush=True)
    return taken


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median over the turns of ``over / under``: what drifts between turns cancels."""
    return median(a / b for a, b in zip(over, under, strict=True))


def spread(values: Sequence[float], *, form: str = "{:.3g}") -> str:
    """Return "median (lower quartile - upper quartile)"."""
    low, middle, high = (
        quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    return f"{form.format(middle)} ({form.format(low)} - {form.format(high)})"


def verdict(value: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """Return "met" or "MISSED", with the target."""
    if at_least is not None:
        return f"{'met' if value >= at_least else 'MISSED'} (at least {at_least:g})"
    assert at_most is not None
    return f"{'met' if value <= at_most else 'MISSED'} (at most {at_most:g})"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(*packages: str) -> str:
    """Return date, processor, cores, load and versions in one line. No names of hosts, users or
    paths.
    """
    cores = len(os.sched_getaffinity(0))
    load = (
        f"load {os.getloadavg()[0]:.1f} of other work before the run"
        if os.getloadavg()[0] >= 0.5
        else "idle before the run"
    )
    versions = [
        f"Python {platform.python_version()}",
        *(f"{name} {_version(name)}" for name in packages),
    ]
    return f"{date.today()}, {_cpu()}, {cores} cores, {load}; {', '.join(versions)}."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()


def record(section: str, body: str, *, path: Path = RESULTS) -> None:
    """Print ``body``, and put it into ``path`` as the section of that name, in place of what stood
    there.

    Sections lie between markers and keep their order; others are not touched, also when two
    benchmarks end at once.
    """
    print(body)
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    block = f"{begin}\n## {section}\n\n{body.strip()}\n{end}\n"
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read() or TITLE
        found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}\n?", text, re.DOTALL)
        text = (
            text[: found.start()] + block + text[found.end() :]
            if found
            else f"{text.rstrip()}\n\n{block}"
        )
        file.truncate(0)
        file.write(text)
