"""Scores of several runs side by side: what `hfscale evaluate` kept, and the newest validation of each run.

A line of the table is ``{"name", SCORE: value, SCORE_low: value, SCORE_high: value, ...}``.
"""
from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfscale.errors import DataError
from hfscale.shards.stats import picture

PREFIX, LOW, HIGH = "validation_", "_low", "_high"
Line = dict[str, Any]


def find(sources: Sequence[Path]) -> list[Line]:
    """Return the evaluations and the newest validation of each run directory, and what each file of scores says.

    Raises:
        DataError: if a source has neither.
    """
    found: list[Line] = []
    for source in sources:
        lines = [_evaluation(file) for file in ([source] if source.is_file() else sorted(source.glob("evaluations/*/*/scores.json")))]
        log = source / "metrics.jsonl"
        for text in reversed(log.read_text("utf-8").splitlines()) if log.is_file() else ():
            with suppress(ValueError):  # torn by a kill
                record = json.loads(text)
                if scores := {name.removeprefix(PREFIX): value for name, value in record.items() if name.startswith(PREFIX)}:
                    lines.append({"name": f"{source} validation, step {record['step']}", **scores})
                    break
        if not lines:
            raise DataError("no scores here", where=source, remedy="name runs that were validated or evaluated, or files scores.json")
        found += lines
    return found


def _evaluation(file: Path) -> Line:
    try:
        content = json.loads(file.read_text("utf-8"))
        ends = {name + end: value for name, pair in content["intervals"].items() for end, value in zip((LOW, HIGH), pair, strict=True)}
        return {"name": f"{content['model']} {file.resolve().parent.parent.name}", **content["scores"], **ends}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError("not a file of scores", where=file, value=str(error)[:80], remedy="name a scores.json that evaluate kept") from None


def _names(found: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in found for name in line if name != "name" and not name.endswith((LOW, HIGH))))


def table(found: Sequence[Line]) -> str:
    """Return the table as text, without the intervals; a score that a line has not is left blank."""
    rows = [["", *_names(found)]]
    rows += [[line["name"], *("" if line.get(name) is None else f"{line[name]:.4f}" for name in _names(found))] for line in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)


def write_csv(found: Sequence[Line], path: Path) -> None:
    """Write the table with the ends of the intervals."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in found for name in line)))
        writer.writeheader()
        writer.writerows(found)


def draw(found: Sequence[Line], path: Path) -> None:
    """Draw a panel a score into ``path``, a PNG, with the intervals."""
    names = _names(found)
    with picture(path, width=7, height=len(names) * (0.8 + 0.25 * len(found))) as figure:
        for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
            for line in reversed([line for line in found if line.get(name) is not None]):
                axes.barh(line["name"], line[name], color="0.75")
                axes.plot([line.get(name + LOW), line.get(name + HIGH)], [line["name"]] * 2, color="black", marker="|")
            axes.set_title(name)
