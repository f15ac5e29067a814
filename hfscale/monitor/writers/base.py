"""What a writer is: it draws a run's curves somewhere, beside ``metrics.jsonl``. The table of
writers, and what keeps them from ever harming a run.

Each writer lives on a thread of its own, from its first import on: a network that is slow or a
library that fails costs no step. One that fails is said once and left.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from hfscale.errors import ConfigError
from hfscale.log import logger
from hfscale.registry import load_plugin

Value = str | float | bool  # of a config

WAITING = 1000  # jobs of a writer that is slower than the run; later ones are left out
CLOSE_S = 60.0  # until a writer that does not end is left


@dataclass(frozen=True)
class About:
    """What a writer may want to know of the run that begins, or goes on."""

    run_dir: Path
    name: str
    first_step: int = 1  # that this attempt will log; later points of earlier attempts are void
    config: Mapping[str, Value] = field(default_factory=dict)  # by dotted key; nulls left out
    texts: Mapping[str, str] = field(default_factory=dict)  # by tag, in markdown


class Writer(Protocol):
    """A place where curves are drawn; made with an ``About``. It may raise anything."""

    def scalars(self, step: int, points: Mapping[str, float]) -> None:
        """Draw the ``points`` of ``step``, by tag (monitor/tags.py)."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Show ``text``, which is markdown."""

    def close(self) -> None:
        """Leave with everything written."""


@dataclass(frozen=True)
class Plug:
    """A writer that can be asked for: its class, the packages it needs, the extra that has them."""

    writer: str
    packages: tuple[str, ...]
    extra: str


WRITERS = {
    "tensorboard": Plug(
        "hfscale.monitor.writers.tensorboard:TensorBoard", ("tensorboard",), extra=""
    ),
    "wandb": Plug("hfscale.monitor.writers.wandb:WandB", ("wandb",), extra="wandb"),
    "mlflow": Plug(
        "hfscale.monitor.writers.mlflow:MLflow",
        ("mlflow", "sqlalchemy", "alembic"),
        extra="mlflow",
    ),
}


def refuse_missing(names: Sequence[str]) -> None:
    """Return if all packages of these writers are installed; nothing is imported.

    Raises:
        ConfigError: naming the first that is not, and the extra that brings it.
    """
    for name in names:
        plug = WRITERS[name]
        for package in plug.packages:
            if find_spec(package) is None:
                extra = f"hfscale[{plug.extra}]" if plug.extra else package
                raise ConfigError(
                    f"the package {package} is not installed",
                    where="metrics.writers",
                    value=name,
                    remedy=f"pip install '{extra}', or leave {name} out of metrics.writers",
                )


class Writers:
    """The writers of a run, by name. No call of it waits for one of them, or fails."""

    def __init__(self, names: Sequence[str], about: About) -> None:
        table = {name: plug.writer for name, plug in WRITERS.items()}

        def maker(name: str) -> Callable[[], Writer]:
            return lambda: load_plugin("writer", table, name)(about)  # type: ignore[no-any-return]

        self._behind = [Behind(name, maker(name)) for name in names]
        for tag, text in about.texts.items():
            self.text(about.first_step - 1, tag, text)

    def scalars(self, step: int, points: Mapping[str, float]) -> None:
        """Draw the ``points`` of ``step``, by tag."""
        for one in self._behind:
            one.do(lambda writer: writer.scalars(step, points))

    def text(self, step: int, tag: str, text: str) -> None:
        """Show ``text``, which is markdown."""
        for one in self._behind:
            one.do(lambda writer: writer.text(step, tag, text))

    def close(self) -> None:
        """Let each writer finish."""
        for one in self._behind:
            one.close()


class Behind:
    """One writer on a thread of its own."""

    def __init__(self, name: str, make: Callable[[], Writer]) -> None:
        self._name, self._make = name, make
        self._jobs: queue.Queue[Callable[[Writer], None] | None] = queue.Queue(WAITING)
        self._ended = self._full = False
        self._thread = threading.Thread(target=self._work, name=f"writer {name}", daemon=True)
        self._thread.start()

    def do(self, job: Callable[[Writer], None]) -> None:
        """Have the writer do ``job`` soon, if it still works."""
        if self._ended:
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            if not self._full:
                logger.warning(f"{self._name} is slower than the run: some points are left out")
            self._full = True

    def close(self) -> None:
        """Return when the writer has ended; one that does not, in ``CLOSE_S``, is left behind."""
        if not self._ended:
            try:
                self._jobs.put(None, timeout=CLOSE_S)
            except queue.Full:
                logger.warning(f"{self._name} stands still: its last points are lost")
                return
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning(f"{self._name} does not end: its last points may be lost")

    def _work(self) -> None:
        try:
            writer = self._make()
            while (job := self._jobs.get()) is not None:
                job(writer)
            writer.close()
        # whatever a stranger's library raises; training must not care
        except Exception as error:
            self._ended = True
            logger.warning(
                f"{self._name} failed and is left out from here on ({type(error).__name__}: "
                f"{str(error)[:300]}); metrics.jsonl has everything"
            )
