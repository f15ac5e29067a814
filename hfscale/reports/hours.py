"""Where the hours of a run went, as lines for people."""

from __future__ import annotations

from datetime import datetime

from hfscale.monitor.clock import duration
from hfscale.reports.goodput import COMPUTE, MEANS, START_UP, Ledger


def describe(run: Ledger) -> list[str]:
    """Return the ledger as lines for people."""
    began = datetime.fromtimestamp(run.began).astimezone().isoformat(sep=" ", timespec="seconds")
    tries = len(run.attempts)
    lines = [
        f"{duration(run.seconds)} since {began}, in {tries} attempt{'s' if tries > 1 else ''}",
        f"goodput {run.goodput():.1%} of it, {run.goodput(held=True):.1%} of the time on nodes",
        "",
    ]
    for name, seconds in run.parts().items():
        share = seconds / run.seconds if run.seconds else 0.0
        lines.append(f"{name:<20}{duration(seconds):>12}{share:>8.1%}  {MEANS[name]}")
        if name == START_UP:
            lines += [
                f"  {part:<18}{duration(part_s):>12}"
                for part, part_s in run.start().items()
                if part_s >= 0.05
            ]
    lines += ["", f"{'attempt':<9}{'steps':>17}{'time':>12}{'start-up':>12}{'compute':>12}  end"]
    for one in run.attempts:
        steps = f"{one.steps[0]:,} - {one.steps[1]:,}"
        start_s = sum(one.start.values())
        code = "" if one.code is None else f"exit code {one.code}"
        lines.append(
            f"{one.number:<9}{steps:>17}{duration(one.ended - one.at):>12}"
            f"{duration(start_s):>12}{duration(one.parts().get(COMPUTE, 0.0)):>12}  {code}".rstrip()
        )
    return lines
