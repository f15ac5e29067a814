"""What is about to be started, as the checks of depth `read` see it: a config on its way to ranks,
here or on nodes of Slurm.

Who starts jobs tells it (``Start``): this room looks, and knows neither Slurm nor launchers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

from hfscale.checks.finding import Finding, failed
from hfscale.checks.judge import against_need
from hfscale.checks.needs import Needs
from hfscale.checks.table import BY_NAME, Check, of_depth
from hfscale.errors import ConfigError

Notices = Sequence[str]
# checks of depth `node` that ask nothing but the process
LIMITS = ("open files", "file size", "threads")


class Start(Protocol):
    """A job that may start. Each question is answered by notices, None where it does not arise, or
    a UserError for the first thing that speaks against the job.
    """

    folder: Path  # of the run; it need not be there yet
    expected: str  # when Slurm would start what was asked for; "" before ``request``

    @property
    def needs(self) -> Needs: ...  # nothing is known of a job that is no run, or cannot be built

    def queue(self) -> tuple[bool, str]: ...  # whether Slurm answers if there is one, and what

    def config(self) -> Notices | None: ...

    def allocation(self) -> Notices | None: ...

    def scripts(self) -> Notices | None: ...

    def request(self) -> Notices | None: ...

    def parts(self) -> Notices | None: ...


def read(start: Start) -> Iterator[Finding]:
    """Yield what the checks of depth `read` find, each judged by what the run needs."""
    for check in of_depth("read"):
        try:
            for finding in _look(check, start):
                yield against_need(finding, start.needs)
        except Exception as error:  # whatever is broken: the others go on
            yield failed(check.name, error)


def refuse(start: Start) -> list[str]:
    """Return notices, after all checks of depth `read`.

    Raises:
        UserError: for the first that fails.
    """
    notices = []
    for check in of_depth("read"):
        for finding in _look(check, start):
            judged = against_need(finding, start.needs) if finding.value is not None else finding
            needs = f"; needed: {judged.needs}" if judged.needs else ""
            if judged.state == "fail":
                raise ConfigError(
                    f"{check.name}: {judged.said}{needs}",
                    where=start.folder,
                    remedy=judged.remedy or BY_NAME[check.name].remedy,
                )
            if judged.state == "warn":
                notices.append(f"{judged.said}{needs}")
    return notices


def refuse_limits() -> None:
    """Return if this process may open and write what its ranks will, and knows how many threads
    they have: they inherit its limits and variables.

    Raises:
        ConfigError: naming what is too little, or no number.
    """
    for check in (BY_NAME[name] for name in LIMITS):
        for finding in _look(check, None):
            judged = against_need(finding, Needs())
            needed = f"; needed: {judged.needs}" if judged.needs else ""
            if judged.state == "fail":
                raise ConfigError(
                    f"{check.name}: {judged.said}{needed}",
                    where="limits and variables of this process",
                    remedy=check.remedy,
                )


def _look(check: Check, subject: Start | None) -> Iterator[Finding]:
    module, _, function = check.look.partition(":")
    findings: Iterator[Finding] = getattr(import_module(module), function)(subject)
    return findings


# ----------------------------------------------------------------------------------------- checks
def slurm(start: Start) -> Iterator[Finding]:
    """Yield what the queue says of this job, or offers."""
    answers, words = start.queue()
    yield Finding("Slurm", "ok" if answers else "warn", words)


def config(start: Start) -> Iterator[Finding]:
    """Yield what speaks against the config, that can be known without torch."""
    yield from _told("config", start.config())


def allocation(start: Start) -> Iterator[Finding]:
    """Yield how the allocation around this process differs from what the config asks for."""
    yield from _told("allocation", start.allocation())


def scripts(start: Start) -> Iterator[Finding]:
    """Yield whether the shell can read what a job runs."""
    yield from _told("scripts", start.scripts(), fits="the shell reads them")


def request(start: Start) -> Iterator[Finding]:
    """Yield what Slurm says of what would be submitted."""
    notices = start.request()
    yield from _told("request", notices, fits=start.expected)


def parts(start: Start) -> Iterator[Finding]:
    """Yield whether tokenizer, data, objective and model fit together."""
    yield from _told("parts", start.parts())


def _told(check: str, notices: Notices | None, *, fits: str = "") -> Iterator[Finding]:
    if notices is not None:
        words = "; ".join(notices)
        yield Finding(check, "warn" if words else "ok", words or fits or "fits")
