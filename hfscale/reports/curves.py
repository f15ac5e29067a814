"""The curves of runs as pictures: SVG, for pages."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from hfscale.reports.status import records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 800  # of a curve; more are put together
# title, fields of a record, whether the axis is one of powers of ten
PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("loss", ("loss", "validation_loss"), False),
    ("gradient norm", ("grad_norm",), True),
    ("learning rate", ("lr",), False),
    ("tokens a second", ("tokens_per_s",), False),
)
WIDTH, HEIGHT = 9.0, 2.1  # inches, of a panel
# of the parts of a run's time: what trains is green, what stands still grey, what is lost red
PART_COLOURS = {
    "queue": "#bbbbbb",
    "between attempts": "#dddddd",
    "start-up": "#e0a458",
    "compute": "#3c8d5a",
    "data stall": "#8d6a9f",
    "communication wait": "#5fa8a0",
    "save stall": "#1f5fa8",
    "evaluation": "#7fb2e5",
    "logging": "#c9c28b",
    "lost work": "#d1495b",
    "hang": "#8b1e2d",
    "shutdown": "#f0cfa0",
}
COLOURS = ("#1f5fa8", "#d1495b", "#3c8d5a", "#8d6a9f")


@dataclass(frozen=True)
class Curves:
    """What a run has logged: of a step that several attempts did, what the last one logged."""

    points: Mapping[int, Mapping[str, object]]  # step -> its record, in order
    # the first step that each attempt but the first logged, or a run after it went back
    restarts: Sequence[int]

    def of(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of the field ``name``, where it is a finite number."""
        pairs: list[tuple[int, float]] = []
        for step, record in self.points.items():
            value = record.get(name)
            if isinstance(value, int | float) and isfinite(value):
                pairs.append((step, float(value)))
        return pairs


def curves_of(run_dir: Path) -> Curves:
    """Return the curves of a run; none if it has logged nothing."""
    newest: dict[int, Mapping[str, object]] = {}
    restarts: list[int] = []
    logged = list(records(run_dir))
    for before, record in pairwise([None, *logged]):
        assert record is not None, "only the first has none before it"
        newest[record["step"]] = record
        if before is None:
            continue
        went_back = record["step"] <= before["step"]
        if went_back or record.get("attempt") != before.get("attempt"):
            restarts.append(record["step"])
    return Curves(dict(sorted(newest.items())), restarts)


@dataclass(frozen=True)
class Point:
    """Neighbouring steps as one: their mean, and between what their values lie."""

    step: float
    mean: float
    least: float
    most: float


def thinned(pairs: Sequence[tuple[int, float]]) -> list[Point]:
    """Return neighbours as one point, at most ``MOST_POINTS`` of them."""
    size = -(-len(pairs) // MOST_POINTS)
    chunks = (pairs[start : start + size] for start in range(0, len(pairs), max(1, size)))
    columns = (zip(*chunk, strict=True) for chunk in chunks)
    return [
        Point(fmean(steps), fmean(values), min(values), max(values)) for steps, values in columns
    ]


def draw_runs(runs: Mapping[str, Curves]) -> str:
    """Return a picture of the curves of one or several runs, one panel below the other, restarts
    marked by dotted lines; "" if nothing was logged.
    """
    panels = [
        panel
        for panel in PANELS
        if any(curves.of(name) for curves in runs.values() for name in panel[1])
    ]
    if not panels:
        return ""
    figure = blank(WIDTH, HEIGHT * len(panels))
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for panel, axis in zip(panels, axes, strict=True):
        _draw_panel(axis, panel, runs)
    axes[-1].set_xlabel("step")
    return svg(figure)


def _draw_panel(
    axis: Axes, panel: tuple[str, tuple[str, ...], bool], runs: Mapping[str, Curves]
) -> None:
    title, names, powers = panel
    drawn = 0
    for colour, (run, curves) in zip(COLOURS, runs.items(), strict=False):
        for number, name in enumerate(names):
            points = thinned(curves.of(name))
            if not points:
                continue
            label = " ".join([run] * (len(runs) > 1) + [name] * (len(names) > 1))
            style = "-" if number == 0 else "o--"
            own = colour if len(runs) > 1 or number == 0 else COLOURS[number]
            steps, means = [one.step for one in points], [one.mean for one in points]
            drawn += 1
            axis.plot(steps, means, style, color=own, lw=1.2, ms=3, label=label or None)
            if any(one.least < one.most for one in points):  # a spike is among them
                least, most = [one.least for one in points], [one.most for one in points]
                axis.fill_between(steps, least, most, color=own, alpha=0.25, lw=0)
        for step in curves.restarts:
            axis.axvline(step, color=colour if len(runs) > 1 else "0.5", ls=":", lw=0.8)
    if powers:
        axis.set_yscale("log")
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(which="both", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    if drawn > 1:
        axis.legend(fontsize=8, frameon=False)


def draw_shares(seconds: Mapping[str, float]) -> str:
    """Return a picture of parts of a whole: one bar, its pieces named below it."""
    figure = blank(WIDTH, 1.2)
    axis = figure.subplots()
    left, whole = 0.0, sum(seconds.values()) or 1.0
    for name, value in seconds.items():
        colour = PART_COLOURS.get(name, "#777777")
        axis.barh(0, value / whole, left=left, color=colour, label=f"{name} {value / whole:.1%}")
        left += value / whole
    axis.set_xlim(0, 1)
    axis.set_axis_off()
    named = axis.get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncol=5, fontsize=7.5, frameon=False)
    return svg(figure)


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """Return a figure as an element of a page; its words stay words."""
    from matplotlib import rc_context

    file = io.StringIO()
    # the ids of its parts are made of the salt, not of random numbers
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hfscale"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
