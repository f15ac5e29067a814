"""`hfscale diff`: in what two runs differ, and from which step on their losses part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.config.load import load_config
from hfscale.config.rules import differences
from hfscale.reports.curves import Curves, curves_of, draw_runs
from hfscale.reports.page import Section, page
from hfscale.run.environment import Entry, entries

WHERE = ("run.name", "run.root")  # in which any two runs differ
COMPARED = ("batch_digest", "lr", "loss", "grad_norm")  # of a step, causes before effects


@dataclass(frozen=True)
class Change:
    """One thing that two runs have not in common; "" where one does not have it."""

    name: str
    first: str
    second: str


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other: what differs, by its kind, and what their steps say."""

    runs: tuple[Path, Path]
    changes: Mapping[str, Sequence[Change]]
    steps: Sequence[str]  # sentences
    curves: tuple[Curves, Curves]

    def text(self) -> str:
        """Return it for a terminal."""
        lines = [f"A  {self.runs[0]}", f"B  {self.runs[1]}"]
        for kind, changes in self.changes.items():
            lines += ["", f"{kind}: {'the same' if not changes else ''}".rstrip()]
            for change in changes:
                lines += [
                    f"  {change.name}",
                    f"    A  {change.first or '-'}",
                    f"    B  {change.second or '-'}",
                ]
        return "\n".join([*lines, "", "steps:", *(f"  {sentence}" for sentence in self.steps)])

    def html(self) -> str:
        """Return it as a page."""
        names = _two_names(self.runs)
        picture = draw_runs(dict(zip(names, self.curves, strict=True)))
        sections = [Section("Losses", self.steps, picture)]
        for kind, changes in self.changes.items():
            rows = [(change.name, change.first, change.second) for change in changes]
            texts = [] if rows else ["The same."]
            sections.append(Section(kind, texts, header=("", *names) if rows else (), rows=rows))
        lead = f"A: {self.runs[0]}; B: {self.runs[1]}"
        return page(" and ".join(names), lead, sections)


def _two_names(runs: tuple[Path, Path]) -> tuple[str, str]:
    first, second = (run.name for run in runs)
    return (first, second) if first != second else (f"A {first}", f"B {second}")


def compare_runs(first: Path, second: Path) -> Comparison:
    """Return in what two runs differ.

    Raises:
        UserError: if one is no run, or a file of it is damaged.
    """
    for run in (first, second):
        if not run_files.is_run(run):
            raise run_files.no_run(run)
    curves = curves_of(first), curves_of(second)
    before, after = _newest(first), _newest(second)
    changes = {"config": _config(first, second), "data": _data(first, second)}
    if before and after:
        changes |= {
            "code": _differing({"commit": before.code.words()}, {"commit": after.code.words()}),
            "versions": _differing(_versions(before), _versions(after)),
            "hardware": _differing(_hardware(before), _hardware(after)),
        }
    else:
        there = ["there" if entry else "not there" for entry in (before, after)]
        unknown = Change(run_files.ENVIRONMENT, *there)
        changes["code, versions and hardware are not known"] = [unknown]
    return Comparison((first, second), changes, parting(*curves), curves)


def _newest(run: Path) -> Entry | None:
    """Return the newest attempt of a run; None if nothing says with what it was made."""
    return [None, *entries(run)][-1]


def _versions(entry: Entry) -> dict[str, str]:
    return {"python": entry.python, **entry.packages}


def _config(first: Path, second: Path) -> list[Change]:
    configs = (load_config(run / run_files.CONFIG).config for run in (first, second))
    return [
        Change(change.key, _written(change.old), _written(change.new))
        for change in differences(*configs)
        if change.key not in WHERE
    ]


def _written(value: object) -> str:
    """Return a value as a config has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _data(first: Path, second: Path) -> list[Change]:
    """Return which sources, or which tokenizer, are not the same bytes, by their digests."""
    digests: list[dict[str, str]] = []
    for run in (first, second):
        state = layout.newest_state(run)
        of_sources = {
            f"source {name}": digest for name, digest in (state.data if state else {}).items()
        }
        tokenizer = {"tokenizer": state.tokenizer_digest} if state else {}
        digests.append({**of_sources, **tokenizer})
    return _differing(*digests)


def _hardware(entry: Entry) -> dict[str, str]:
    devices = sorted({rank.partition(": ")[2] for rank in entry.ranks})
    return {
        "ranks": str(entry.procs),
        "devices": ", ".join(devices),
        "hosts": ", ".join(sorted({rank.partition(": ")[0] for rank in entry.ranks})),
        "platform": entry.platform,
    }


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[Change]:
    names = dict.fromkeys([*first, *second])
    pairs = ((name, first.get(name, ""), second.get(name, "")) for name in names)
    return [Change(*pair) for pair in pairs if pair[1] != pair[2]]


def parting(first: Curves, second: Curves) -> list[str]:
    """Return sentences on the steps that both runs have logged: up to where they are equal, what
    differs first, how far they are apart in the end.
    """
    ours, theirs = first.points, second.points
    common = [step for step in ours if step in theirs]
    if not common:
        return ["They have no logged step in common."]
    parted = _first(common, ours, theirs, COMPARED)
    if parted is None:
        return [f"All {len(common)} steps that both have logged, to step {common[-1]}, are equal."]
    step, names = parted
    equal = f"They are equal to step {common[common.index(step) - 1]}. " * (step != common[0])
    sentences = [f"{equal}At step {step} they first differ, in {', '.join(names)}."]
    if names[0] == "batch_digest":
        sentences.append("From there on they read other data.")
    losses = _first(common, ours, theirs, ("loss",))
    for at, what in (
        (losses[0] if losses else None, "From step {} on the losses part"),
        (common[-1], "At step {}, the last that both have, they are"),
    ):
        if at is not None:
            pair = f"{ours[at].get('loss')} and {theirs[at].get('loss')}"
            sentences.append(f"{what.format(at)}: {pair}.")
    return sentences


def _first(
    steps: Sequence[int],
    ours: Mapping[int, Mapping[str, object]],
    theirs: Mapping[int, Mapping[str, object]],
    names: Sequence[str],
) -> tuple[int, list[str]] | None:
    """Return the first of ``steps`` at which one of the fields ``names`` differs, and which do."""
    for step in steps:
        differing = [name for name in names if ours[step].get(name) != theirs[step].get(name)]
        if differing:
            return step, differing
    return None
