"""Scores of several runs side by side: what `hfscale evaluate` kept, and the newest validation of
each run.

A line of the table has the values of SCORE, SCORE_low, SCORE_high, ...
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from statistics import fmean, stdev

from hfscale import run_files
from hfscale.config.load import read_tree
from hfscale.errors import DataError
from hfscale.metrics.kept import read_scores
from hfscale.reports.status import records
from hfscale.shards.files import cannot_write
from hfscale.shards.stats import picture

PREFIX, LOW, HIGH, DEVIATION = "validation_", "_low", "_high", "_deviation"


@dataclass(frozen=True)
class Line:
    """The scores of a model; None: undefined."""

    name: str
    task: str | None
    scores: dict[str, float | None]


def find(sources: Sequence[Path]) -> list[Line]:
    """Return the evaluations, the best validation (of ``checkpoint.keep_best``) and the newest of
    each run directory, and what each file of scores says; then the means of runs that differ in
    seed alone. Where tasks differ, the names of scores begin with the task.

    Raises:
        DataError: if a source has neither.
    """
    rows: list[Line] = []
    alike: dict[
        tuple[str, str], dict[Path, Line]
    ] = {}  # (what was scored, config) -> the newest line of each run
    for source in sources:
        config = read_tree(source / run_files.CONFIG).values if run_files.is_run(source) else {}
        lines = [*_evaluations(source), *_validations(source, config)]
        if not lines:
            raise DataError(
                "no scores here",
                where=source,
                remedy="name runs that were validated or evaluated, or files scores.json",
            )
        for what, line in lines:
            rows.append(line)
            if config:
                alike.setdefault((what, json.dumps(config | {"run": None}, default=str)), {})[
                    source
                ] = line
    rows += [_mean(what, [*lines.values()]) for (what, _), lines in alike.items() if len(lines) > 1]
    if len({line.task for line in rows}) > 1:  # a name, such as f1, may then be of several scales
        rows = [_named_by_task(line) for line in rows]
    return rows


def _named_by_task(line: Line) -> Line:
    """Return a line whose scores have their task before their names."""
    if not line.task:
        return line
    scores = {f"{line.task} {name}": value for name, value in line.scores.items()}
    return replace(line, scores=scores)


def _evaluations(source: Path) -> Iterator[tuple[str, Line]]:
    """Yield what each file of scores of a run, or the file ``source``, is of and says."""
    files = (
        [source]
        if source.is_file()
        else sorted(source.glob(f"{run_files.EVALUATIONS}/*/*/{run_files.SCORES}"))
    )
    lines = [_evaluation(file) for file in files]
    names = Counter([line.name for line in lines])
    for file, line in zip(files, lines, strict=True):
        folder = file.resolve().parent
        if names[line.name] > 1:  # other options, or other shards: its folder tells
            line = replace(line, name=f"{line.name} {folder.name}")
        yield folder.parent.name, line


def _validations(run: Path, config: dict[str, object]) -> Iterator[tuple[str, Line]]:
    """Yield the best validation of a run, if its config says what is best, and the newest one."""
    validated = [
        record for record in records(run) if any(name.startswith(PREFIX) for name in record)
    ]
    chosen = []
    if best := _section(_section(config, "checkpoint"), "keep_best"):
        metric = str(best["metric"])
        choose = min if best["mode"] == "min" else max
        scored = [record for record in validated if record.get(metric) is not None]
        chosen = [("best validation", choose(scored, key=itemgetter(metric)))] if scored else []
    for what, record in [*chosen, *(("validation", record) for record in validated[-1:])]:
        scores = {
            name.removeprefix(PREFIX): value
            for name, value in record.items()
            if name.startswith(PREFIX)
        }
        task = _section(config, "task").get("name")
        name = f"{run} {what}, step {record['step']}"
        yield what, Line(name, str(task) if task else None, scores)


def _section(config: Mapping[str, object], name: str) -> dict[str, object]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _mean(what: str, lines: Sequence[Line]) -> Line:
    """Return the mean of runs whose configs differ in name and seed alone, and on both sides of it
    their (sample's) deviation.
    """
    scores: dict[str, float | None] = {}
    for name in score_names(lines):
        values = [value for line in lines if (value := line.scores.get(name)) is not None]
        if len(values) > 1:
            middle, deviation = fmean(values), stdev(values)
            scores |= {
                name: middle,
                name + DEVIATION: deviation,
                name + LOW: middle - deviation,
                name + HIGH: middle + deviation,
            }
    return Line(f"{what}, mean of {len(lines)} seeds", lines[0].task, scores)


def _evaluation(file: Path) -> Line:
    content = read_scores(file)
    ends = {
        name + end: value
        for name, pair in content.intervals.items()
        for end, value in zip((LOW, HIGH), pair, strict=True)
    }
    model = content.model.removeprefix(f"{Path.cwd()}/")
    name = f"{model} {file.resolve().parent.parent.name}"
    return Line(name, content.task, {**content.scores, **ends})


def score_names(found: Sequence[Line]) -> list[str]:
    names = dict.fromkeys(name for line in found for name in line.scores)
    return [name for name in names if not name.endswith((LOW, HIGH, DEVIATION))]


def table(found: Sequence[Line]) -> str:
    """Return the table as text, without the intervals; a score that a line has not is left
    blank.
    """
    rows = [["", *score_names(found)]]
    rows += [[line.name, *(_cell(line, name) for name in score_names(found))] for line in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def _cell(line: Line, name: str) -> str:
    value, deviation = line.scores.get(name), line.scores.get(name + DEVIATION)
    if value is None:
        return ""
    return f"{value:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def write_csv(found: Sequence[Line], path: Path) -> None:
    """Write the table with the ends of the intervals.

    Raises:
        DataError: if it cannot be written.
    """
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            columns = dict.fromkeys(name for line in found for name in line.scores)
            writer = csv.DictWriter(file, ["name", *columns])
            writer.writeheader()
            writer.writerows([{"name": line.name, **line.scores} for line in found])
    except OSError as error:
        raise cannot_write(path, error) from None


def draw(found: Sequence[Line], path: Path) -> None:
    """Draw a panel a score into ``path``, a PNG, with the intervals."""
    names = score_names(found)
    with picture(
        path,
        width=4 + 0.08 * max(len(line.name) for line in found),
        height=len(names) * (0.8 + 0.25 * len(found)),
    ) as figure:
        for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
            for line in reversed([line for line in found if line.scores.get(name) is not None]):
                axes.barh(line.name, line.scores[name], color="0.75")
                axes.plot(
                    [line.scores.get(name + LOW), line.scores.get(name + HIGH)],
                    [line.name] * 2,
                    color="black",
                    marker="|",
                )
            axes.set_title(name)
