"""`hfscale plan --check RUN`: what a run took beside what its plan says, kept as ``plan.json`` in
the run, from which later plans learn (``corrections.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Annotated

from pydantic import Field

from hfscale import run_files
from hfscale.config.load import load_config
from hfscale.errors import CheckpointError, UserError
from hfscale.models.devices import CPU, Device, device_seen
from hfscale.monitor.lines import read_lines
from hfscale.planning.corrections import MEMORY, SAVE, STEP, UNITS, Checked
from hfscale.planning.figures import GIB, shown
from hfscale.planning.plan import Plan, make_plan
from hfscale.planning.site import Asked, Measured
from hfscale.records import Count, Record, load
from hfscale.run.environment import Entry, entries
from hfscale.shards.files import write_atomically

Seconds = Annotated[float, Field(ge=0, lt=1e12)]
Gib = Annotated[float, Field(ge=0, lt=1e8)]
WARM = 2  # logged steps, before which caches fill and kernels are made


class _Logged(Record):
    """A line of ``metrics.jsonl``, as far as a plan speaks of it."""

    step: Count
    attempt: Count
    step_s: Seconds | None = None
    save_s: Seconds | None = None
    memory_gib: Gib | None = None


class _Detail(Record):
    """A line of ``details.jsonl``; tags are further keys."""

    attempt: Count = 0


@dataclass(frozen=True)
class Check:
    """A run beside its plan."""

    plan: Plan
    record: Checked
    changed: tuple[str, ...]  # since it was last checked

    def text(self) -> str:
        """Return the comparison for people."""
        lines = [f"{self.plan.name} on {self.plan.place}, attempt {self.record.attempt}"]
        lines += [f"  changed since the last check: {line}" for line in self.changed]
        lines.append(f"  {'':<8}{'planned':>12}{'seen':>12}{'off':>9}")
        for name, seen in self.record.seen.items():
            planned = self.record.planned[name]
            unit = UNITS[name]
            off = f"{planned / seen - 1:+.1%}"
            lines.append(f"  {name:<8}{shown(planned, unit):>12}{shown(seen, unit):>12}{off:>9}")
        if SAVE not in self.record.seen:
            lines.append("  no save was logged: the first step behind one says how long it took")
        return "\n".join(lines)


def check(run_dir: Path, *, measured: Measured | None = None) -> Check:
    """Return what the newest attempt of a run took beside its plan, and keep it in the run;
    ``measured`` is what doctor said of the machines.

    Raises:
        CheckpointError: if the run has not logged a step or does not say on what ranks, or has
            begun anew since it did: what it logged is then of another config.
        UserError: if it cannot be planned.
    """
    config = load_config(run_dir / run_files.CONFIG, _home(run_dir)).config
    attempts = entries(run_dir)
    logged = _of_last_attempt(run_dir)
    if len(attempts) > logged[-1].attempt:
        raise CheckpointError(
            "the run has begun anew since it last logged a step: its config may be another",
            where=run_dir,
            value=f"attempt {len(attempts)}, logged was attempt {logged[-1].attempt}",
            remedy="check it once it has logged steps",
        )
    if not attempts:
        raise CheckpointError(
            "nothing says on how many ranks the run was trained",
            where=run_dir / run_files.ENVIRONMENT,
            remedy="copy it from where the run was trained",
        )
    entry = attempts[-1]
    device, nodes = _device(entry, run_dir), _nodes(entry)
    asked = Asked(
        gpu=device.key,
        gpus=max(1, entry.procs),
        nodes=nodes,
        corrected=False,
        measured=measured,
    )
    plan = make_plan(config, asked)
    record = Checked(
        device=device.key,
        attempt=logged[-1].attempt,
        setup=plan.setup,
        planned={MEMORY: plan.peak, STEP: plan.step_s, SAVE: plan.save_s},
        seen=_seen(run_dir, logged),
        measured=measured is not None,
    )
    changed = tuple(_changes(_before(run_dir), record))
    text = json.dumps(record.as_dict(), indent=1)
    write_atomically(run_dir / run_files.PLAN, text.encode())
    return Check(plan, record, changed)


def _home(run_dir: Path) -> list[str]:
    """Return the overrides by which a run is where it lies, also if it was moved."""
    return [f"run.root={json.dumps(str(run_dir.parent))}", f"run.name={json.dumps(run_dir.name)}"]


def _of_last_attempt(run_dir: Path) -> list[_Logged]:
    lines = [*read_lines(run_dir / run_files.METRICS, _Logged)]
    if not lines:
        raise CheckpointError(
            "this run has logged no step: there is nothing to compare with its plan",
            where=run_dir / run_files.METRICS,
            remedy="train it, if only for metrics.every_steps steps",
        )
    return [line for line in lines if line.attempt == lines[-1].attempt]


def _seen(run_dir: Path, logged: list[_Logged]) -> dict[str, float]:
    """Return the peak of memory (what torch reserved, where it says so), the usual step and the
    usual save.
    """
    seen = dict[str, float]()
    held = [line.memory_gib * GIB for line in logged if line.memory_gib]
    held += [value * GIB for value in _reserved(run_dir, logged[-1].attempt)]
    if held:
        seen[MEMORY] = max(held)
    steps = [line.step_s for line in logged if line.step_s]
    if usual := steps[WARM:] or steps:
        seen[STEP] = median(usual)
    # a save is logged with each step until the next one
    saves = [took for took, _ in groupby(line.save_s for line in logged) if took]
    if saves:
        seen[SAVE] = median(saves)
    return seen


def _reserved(run_dir: Path, attempt: int) -> Iterator[float]:
    for line in read_lines(run_dir / run_files.DETAILS, _Detail):
        value = (line.model_extra or {}).get("memory/reserved")
        if line.attempt == attempt and isinstance(value, int | float) and 0 < value < 1e8:
            yield float(value)


def _device(entry: Entry, run_dir: Path) -> Device:
    name = entry.ranks[0].partition(": ")[2] if entry.ranks else "cpu"
    if name == "cpu":
        return CPU
    if device := device_seen(name):
        return device
    raise CheckpointError("the run's GPU is not in the table of devices", where=run_dir, value=name)


def _nodes(entry: Entry) -> int:
    return len({rank.partition(":")[0] for rank in entry.ranks}) or 1


def _before(run_dir: Path) -> Checked | None:
    file = run_dir / run_files.PLAN
    if not file.is_file():
        return None
    try:
        return load(file, Checked, what="the plan of the run")
    except UserError:
        return None  # it is written anew


def _changes(before: Checked | None, now: Checked) -> Iterator[str]:
    for key, value in now.setup.items() if before else ():
        old = before.setup.get(key) if before else None
        if old is not None and old != value:
            yield f"{key}: {old} -> {value}"
