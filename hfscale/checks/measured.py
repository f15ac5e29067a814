"""What `hfscale doctor --json` measured, as a plan takes it: the slowest rank or node of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hfscale.checks.finding import NO_GPU, product_rate
from hfscale.errors import ConfigError
from hfscale.planning.memory import BYTES
from hfscale.planning.site import Measured
from hfscale.records import Record, load

SPEEDS = ("matrix products", "memory speed", "all-reduce", "writing")
LEAST, MOST = 1e-6, 1e9  # in the units of doctor: what is outside was not measured


class _Found(Record):
    """One of its findings, as far as a plan needs it."""

    check: str
    said: str
    value: float | None = None
    unit: str = ""


class _Report(Record):
    """All that it printed."""

    nodes: list[str]
    findings: list[_Found]


def read_measured(file: Path) -> Measured:
    """Return what is measured in ``file``, the JSON of doctor.

    Raises:
        ConfigError: if it is none, or nothing in it was measured.
    """
    remedy = f"hfscale doctor --json > {file.name}, on the nodes that are planned for"
    report = load(file, _Report, what="doctor's JSON", remedy=remedy, error=ConfigError)
    found = report.findings
    for one in found:
        if one.check in SPEEDS and one.value is not None and not LEAST < one.value < MOST:
            raise ConfigError(
                f"{one.check}: this is no speed",
                where=file,
                value=one.value,
                remedy=remedy,
            )
    flops = {
        precision: 1e12 * rate
        for precision in BYTES
        if (rate := _least(found, "matrix products", product_rate(precision)))
    }
    measured = Measured(
        str(file),
        nodes=max(1, len(report.nodes)),
        on_cpu=any(one.check == "GPU" and one.said == NO_GPU for one in found),
        exchange=_scaled(_least(found, "all-reduce"), 1e9),
        disk=_scaled(_least(found, "writing"), 1e6),
        memory=_scaled(_least(found, "memory speed"), 1e9),
        flops=flops,
    )
    if not (measured.exchange or measured.disk or measured.memory or flops):
        raise ConfigError("nothing in it was measured", where=file, remedy=remedy)
    return measured


def _least(found: Sequence[_Found], check: str, unit: str = "") -> float | None:
    values = [one.value for one in found if one.check == check and unit in one.unit and one.value]
    return min(values, default=None)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
