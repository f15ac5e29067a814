"""Scores of several runs side by side: what `hfscale evaluate` kept, and the newest validation of each run."""
from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfscale.errors import DataError
from hfscale.shards.stats import picture

PREFIX = "validation_"


@dataclass(frozen=True)
class Scored:
    """One line of the table."""

    name: str
    scores: dict[str, float | None]
    intervals: dict[str, Sequence[float]] = field(default_factory=dict)


def find(sources: Sequence[Path]) -> list[Scored]:
    """Return the evaluations and the newest validation of each run directory, and what each file of scores says.

    Raises:
        DataError: if a source has neither.
    """
    found: list[Scored] = []
    for source in sources:
        files = [source] if source.is_file() else sorted(source.glob("evaluations/*/*/scores.json"))
        lines = [_evaluation(file) for file in files]
        log = source / "metrics.jsonl"
        for text in reversed(log.read_text("utf-8").splitlines()) if log.is_file() else ():
            with suppress(ValueError):  # torn by a kill
                record = json.loads(text)
                if scores := {name.removeprefix(PREFIX): value for name, value in record.items() if name.startswith(PREFIX)}:
                    lines.append(Scored(f"{source} validation, step {record['step']}", scores))
                    break
        if not lines:
            raise DataError("no scores here", where=source, remedy="name runs that were validated or evaluated, or files scores.json")
        found += lines
    return found


def _evaluation(file: Path) -> Scored:
    try:
        content = json.loads(file.read_text("utf-8"))
        return Scored(f"{content['model']} {file.resolve().parent.parent.name}", content["scores"], content["intervals"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError("not a file of scores", where=file, value=str(error)[:80], remedy="name a scores.json that evaluate kept") from None


def table(found: Sequence[Scored]) -> str:
    """Return the table as text; a metric that a line has not is left blank."""
    rows = [["", *_names(found)], *([one.name, *(_cell(one.scores.get(name)) for name in _names(found))] for one in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)


def write_csv(found: Sequence[Scored], path: Path) -> None:
    """Write the table with the ends of the intervals, as ``NAME_low`` and ``NAME_high``."""
    rows: list[dict[str, Any]] = []
    for one in found:
        ends = {f"{name}_{end}": value for name, pair in one.intervals.items() for end, value in zip(("low", "high"), pair, strict=True)}
        rows.append({"name": one.name, **one.scores, **ends})
    columns = list(dict.fromkeys(sorted((column for row in rows for column in row), key=lambda column: column != "name")))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw(found: Sequence[Scored], path: Path) -> None:
    """Draw a panel a metric into ``path``, a PNG, with the intervals."""
    names = _names(found)
    with picture(path, width=7, height=len(names) * (0.6 + 0.25 * len(found))) as figure:
        for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
            there = [one for one in reversed(found) if one.scores.get(name) is not None]
            axes.barh([one.name for one in there], [one.scores[name] for one in there], color="0.75")
            for one in there:
                if name in one.intervals:
                    axes.plot(one.intervals[name], [one.name] * 2, color="black", marker="|")
            axes.set_title(name)


def _names(found: Sequence[Scored]) -> list[str]:
    return list(dict.fromkeys(name for one in found for name in one.scores))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
