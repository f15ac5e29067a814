"""Many inputs, spread over the surfaces, and what became of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from benchmarks.fuzz.act import Random
from benchmarks.fuzz.attempt import attempt
from benchmarks.fuzz.base import make_base
from benchmarks.fuzz.surfaces import SURFACES


@dataclass
class Tally:
    """What became of the inputs of a surface."""

    kinds: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


BAD = ("traceback", "hang", "killed", "silent")


def run(
    inputs: int, *, seed: int, home: Path, only: Sequence[str] = (), base: Path | None = None
) -> dict[str, Tally]:
    """Return what became of ``inputs`` inputs, spread over the surfaces; the bad ones are
    printed.
    """
    base = base or make_base(home)
    warm_up()
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    chosen = {name: surface for name, surface in SURFACES.items() if not only or name in only}
    total, tallies = sum(surface.share for surface in chosen.values()), dict[str, Tally]()
    for name, surface in chosen.items():
        truth = surface.reads(base) if surface.reads else None
        tally = tallies[name] = Tally()
        for number in range(max(1, round(inputs * surface.share / total))):
            rng = Random(f"{seed}/{name}/{number}")
            outcome = attempt(surface, rng, base, home / "scratch", truth)
            tally.kinds[outcome.kind] += 1
            tally.slowest_s = max(tally.slowest_s, outcome.seconds)
            if outcome.kind in BAD:
                last = outcome.output.strip().splitlines()[-1:] or [""]
                tally.bad.append(
                    f"{name}:{number} {outcome.kind} ({outcome.code}): {last[0][:200]}"
                )
                print(tally.bad[-1], flush=True)
        print(f"{name}: {dict(tally.kinds)}, slowest {tally.slowest_s:.1f} s", flush=True)
    return tallies


def spread(
    inputs: int, *, seed: int, home: Path, only: Sequence[str], jobs: int
) -> dict[str, Tally]:
    """Return as ``run``, with each surface in a process of its own, ``jobs`` at once; the base lies
    in ``home``.
    """
    chosen = [name for name in SURFACES if not only or name in only]
    total = sum(SURFACES[name].share for name in chosen)

    def one(name: str) -> Tally:
        own = home / name.replace(" ", "-")
        own.mkdir(exist_ok=True)
        if not (own / "base").exists():
            (own / "base").symlink_to(home / "base")
        count = max(1, round(inputs * SURFACES[name].share / total))
        words = ["--inputs", str(count), "--seed", str(seed), "--home", str(own), "--only", name]
        command = [sys.executable, "-m", "benchmarks.fuzz", *words, "--tally", str(own / "tally")]
        subprocess.run(command, check=True)
        said = json.loads((own / "tally").read_text())
        return Tally(Counter(said["kinds"]), said["bad"], said["slowest_s"])

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(chosen, pool.map(one, chosen), strict=True))


def warm_up() -> None:
    """Import what the commands need, once, before anything is forked."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here asks the hub
    for name in WARM:
        import_module(name)


WARM = ["transformers", "launch.cli", "launch.local", "launch.commands.evaluate"]
WARM += [f"hfscale.jobs.{name}" for name in ("asked", "evaluate", "export", "predict", "shards")]
WARM += [f"hfscale.reports.{name}" for name in ("batch", "cat", "checkpoints", "compare")]
WARM += ["hfscale.tasks.text_generation", "hfscale.objectives.clm", "hfscale.shards.verify"]
