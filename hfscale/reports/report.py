"""`hfscale report`: a run on one page, from the files of its directory."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from math import prod
from pathlib import Path

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.config.load import load_config, to_yaml
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.errors import CheckpointError, DataError, counted
from hfscale.monitor.clock import duration
from hfscale.monitor.fence import newest
from hfscale.monitor.incidents import incidents
from hfscale.monitor.lines import read_lines
from hfscale.records import Count, Record
from hfscale.reports import compare
from hfscale.reports.checkpoints import list_checkpoints
from hfscale.reports.curves import MOST_POINTS, curves_of, draw_runs, draw_shares
from hfscale.reports.goodput import MEANS, ledger
from hfscale.reports.page import Section, page
from hfscale.reports.status import describe, last_record
from hfscale.run.environment import Entry, entries

MOST_INCIDENTS = 50  # that are shown
LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "webdataset", "numpy")


def report(run_dir: Path) -> str:
    """Return the page of a run, as HTML.

    Raises:
        UserError: if this is no run, or one of its files is damaged.
    """
    config = load_config(run_dir / run_files.CONFIG).config
    assert isinstance(config, TrainConfig), "a run that trains"
    # a run that was moved is where it lies, not where it says that it is
    place = {"root": run_dir.parent, "name": run_dir.name}
    config = config.model_copy(update={"run": config.run.model_copy(update=place)})
    attempts = entries(run_dir)
    sections = [
        _status(config),
        _curves(config),
        _time(run_dir),
        _incidents(run_dir),
        _data(config),
        _checkpoints(run_dir),
        _scores(run_dir),
        _attempts(attempts),
        _again(config, attempts),
        Section("The whole config", code=to_yaml(config), folded=run_files.CONFIG),
    ]
    return page(config.run.name, lead(config), sections)


def _curves(config: TrainConfig) -> Section:
    curves = curves_of(config.run_dir)
    texts = _unless(curves.points, "No step was logged yet.")
    if len(curves.points) > MOST_POINTS:
        texts = ["Of many steps a line is their mean; shaded is what lies between least and most."]
    if curves.restarts:
        texts.append("Dotted: where another attempt, or a run that went back, goes on.")
    return Section("Curves", texts, draw_runs({config.run.name: curves}))


def _unless(there: object, text: str) -> list[str]:
    return [] if there else [text]


def lead(config: TrainConfig) -> str:
    """Return a sentence on what a run is."""
    values = config.model_dump(mode="json")
    aim = values.get("objective") or values.get("task") or {}
    model = config.model.architecture or config.model.pretrained
    size = _parameters(config.run_dir)
    words = [
        f"{config.verb}: {aim.get('name')}, {model}",
        *([f"{size:,} parameters"] if size else []),
        f"{config.engine.precision}, ZeRO {config.engine.zero_stage}",
        f"{config.train.global_batch} rows a step",
    ]
    return ", ".join(words)


def _parameters(run_dir: Path) -> int:
    """Return how many weights the newest checkpoint has; 0 if there is none to ask."""
    saved = layout.committed(run_dir / run_files.CHECKPOINTS)
    if not saved:
        return 0
    from hfscale.checkpoint.store import FragmentReader  # slow to import

    reader = FragmentReader(saved[-1])
    count = sum(prod(shape) for shape in reader.shapes.values())
    reader.close()
    return count


def _status(config: TrainConfig) -> Section:
    lines = describe(config, running=_running(config.run_dir))
    return Section("Where it is", rows=[(line.name, line.words) for line in lines])


def _running(run_dir: Path) -> bool:
    attempt = newest(run_dir)
    return attempt is not None and attempt.under_way()


def _time(run_dir: Path) -> Section:
    title = "Where the time went"
    try:
        times = ledger(run_dir)
    except CheckpointError as error:  # of a version that kept no times, or not begun
        return Section(title, [error.what])
    parts = times.parts()
    rows: list[Sequence[object]] = [
        (name, duration(seconds), f"{seconds / times.seconds:.1%}", MEANS[name])
        for name, seconds in parts.items()
    ]
    starts = ", ".join(f"{name} {s:.1f} s" for name, s in times.start().items() if s >= 0.05)
    texts = [
        f"{duration(times.seconds)} since the first submission, in "
        f"{counted(len(times.attempts), 'attempt')}: goodput {times.goodput():.1%}, "
        f"{times.goodput(held=True):.1%} of the time on nodes.",
        f"The start-up: {starts}.",
    ]
    return Section(title, texts, draw_shares(parts), ("part", "time", "share", ""), rows)


def _incidents(run_dir: Path) -> Section:
    rows = [
        (_moment(one.time), f"step {one.step:,}", one.kind, one.decision, one.text)
        for one in incidents(run_dir)
    ]
    shown = rows[-MOST_INCIDENTS:]
    texts = _unless(rows, "None.")
    if len(rows) > len(shown):
        texts = [f"The newest {len(shown)} of {len(rows):,}."]
    header = ("when", "step", "kind", "decision", "") if rows else ()
    return Section("Incidents", texts, header=header, rows=shown)


def _data(config: TrainConfig) -> Section:
    """Return what was to be read, and what was."""
    record = last_record(config.run_dir)
    if not isinstance(config, RunConfig):
        data = config.data.model_dump(mode="json")
        tables = [(name, data[name]) for name in ("train", "validation", "test") if data.get(name)]
        return Section("Data", header=("split", "table, or share of the one above"), rows=tables)
    passes: Mapping[str, float] = record.get("source_epoch") or {}
    read = _rows_read(config.run_dir)
    whole, weights = sum(read.values()), sum(one.weight for one in config.data.sources)
    alone = len(config.data.sources) == 1
    rows: list[Sequence[object]] = []
    for source in config.data.sources:
        share = f"{read[source.name] / whole:.1%}" if whole and source.name in read else ""
        share = "100.0%" if alone and record else share
        epochs = record.get("epoch") if alone else passes.get(source.name)
        done = "" if epochs is None else f"{epochs:.3f}"
        rows.append((source.name, source.shards, f"{source.weight / weights:.1%}", share, done))
    texts = [f"{record['tokens_seen']:,} tokens so far."] if record else []
    header = ("source", "shards", "planned", "as read", "passes")
    return Section("Data", texts, header=header, rows=rows)


def _rows_read(run_dir: Path) -> dict[str, int]:
    """Return the rows of each source of a mixture, as the newest checkpoint has them."""
    state = layout.newest_state(run_dir)
    if state is None or "sources" not in state.stream:
        return {}
    return {name: rows for name, (_, rows) in state.position.sources.items()}


def _checkpoints(run_dir: Path) -> Section:
    lines = [line for line, _ in list_checkpoints(run_dir, verify=False)]
    exports = [
        (_moment(one.time), f"step {one.step:,}", one.folder)
        for one in read_lines(run_dir / run_files.EXPORTS, _Export)
    ]
    return Section(
        "Checkpoints and exports",
        _unless(lines, "No checkpoint yet."),
        header=("exported", "step", "folder") if exports else (),
        rows=exports,
        code="\n".join(lines),
    )


class _Export(Record):
    """A line of ``exports.jsonl``."""

    time: float
    step: Count
    folder: str


def _moment(seconds: float) -> str:
    """Return a moment of the epoch for people."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="minutes")


def _scores(run_dir: Path) -> Section:
    """Return the evaluations and validations, with intervals where there are any."""
    title = "Scores"
    try:
        lines = compare.find([run_dir])
    except DataError:
        return Section(title, ["It was neither validated nor evaluated yet."])
    rows: list[Sequence[object]] = []
    for line in lines:
        for name in compare.score_names([line]):
            low, high = (line.scores.get(name + end) for end in (compare.LOW, compare.HIGH))
            between = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
            value = line.scores.get(name)
            rows.append((line.name, name, "" if value is None else f"{value:.4f}", between))
    return Section(title, header=("", "score", "value", "95 % interval"), rows=rows)


def _attempts(attempts: Sequence[Entry]) -> Section:
    rows = []
    for entry in attempts:
        where = "; ".join(dict.fromkeys(entry.ranks)) or entry.host
        rows.append((entry.started, entry.launcher, entry.procs, where, entry.code.words()))
    packages = attempts[-1].packages if attempts else {}
    versions = ", ".join(f"{name} {packages[name]}" for name in LIBRARIES if name in packages)
    texts = [f"Newest: Python {attempts[-1].python}; {versions}."] if attempts else ["None yet."]
    header = ("started", "launcher", "ranks", "where", "code")
    return Section("Hardware, versions, code", texts, header=header, rows=rows)


def _again(config: TrainConfig, attempts: Sequence[Entry]) -> Section:
    """Return how to make the run once more."""
    lines = []
    if attempts and (revision := attempts[0].code.revision):
        lines.append(f"git checkout {revision}")
        if patch := attempts[0].code.patch:
            lines.append(f"git apply {shlex.quote(str(config.run_dir / patch))}")
    saved = shlex.quote(str(config.run_dir / run_files.CONFIG))
    again = shlex.quote(f"run.name={config.run.name}-again")
    procs = f" --procs {attempts[-1].procs}" if attempts else ""
    lines.append(f"hfscale {config.verb} {saved} {again}{procs}")
    typed = " ".join(map(shlex.quote, attempts[0].command[1:])) if attempts else ""
    texts = [f"It was started by: hfscale {typed}"] if typed else []
    return Section("To repeat it", texts, code="\n".join(lines))
