"""Where a run's figures go: ``metrics.jsonl`` (the record), ``details.jsonl`` (what only pictures
need), the writers (pictures) and the console (one line).

Only rank 0 holds a ``MetricsLog``. A resumed run appends: a step that is logged again carries a
higher ``attempt``, and writers drop what the earlier attempt drew of the steps that are repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from hfscale import run_files
from hfscale.log import logger
from hfscale.monitor.fence import Fence
from hfscale.monitor.lines import Lines, finite
from hfscale.monitor.tags import tagged
from hfscale.monitor.writers.base import About, Writers
from hfscale.records import Count, Record, parse

CONSOLE = (
    ("loss", "{:.4f}"),
    ("validation_loss", "{:.4f}"),
    ("lr", "{:.2e}"),
    ("grad_norm", "{:.3f}"),
    ("mfu", "{:.1%}"),
    ("skipped_rows", "{:,}"),
)


# a line of metrics.jsonl: numbers by name, null where they are not finite; ``source_loss`` is by
# source
Logged = dict[str, Any]


class MetricsLog:
    """Appends one record a logged step, and draws it with the named ``writers``."""

    def __init__(
        self,
        about: About,
        *,
        total_steps: int,
        writers: Sequence[str] = (),
        fence: Fence | None = None,
    ) -> None:
        self.run_dir, self.total_steps = about.run_dir, total_steps
        self._lines = Lines(self.run_dir / run_files.METRICS, fence=fence)
        self._details = Lines(self.run_dir / run_files.DETAILS, fence=fence)
        before = parse(_Line, self._lines.last).attempt if self._lines.last else 0
        self.attempt = before + 1
        self._about, self._names = about, writers
        self._writers = Writers(writers, about)

    def rewind(self, first_step: int) -> None:
        """Return with pictures that end before ``first_step``, which will be logged next."""
        self._writers.close()
        self._writers = Writers(self._names, replace(self._about, first_step=first_step))

    def write(self, record: Logged, details: Mapping[str, float] | None = None) -> None:
        """Write one step's record everywhere, and its ``details`` (by tag) everywhere else. Values
        are numbers, None, or dicts of numbers; what is not finite becomes None.

        Raises:
            SupersededError: if a younger attempt has begun; nothing is written then.
        """
        record = {name: finite(value) for name, value in record.items()}
        self._lines.append({**record, "attempt": self.attempt})
        if details:
            self._details.append({"step": record["step"], "attempt": self.attempt, **details})
        self._writers.scalars(record["step"], tagged(record) | dict(details or {}))
        logger.info(self._line(record))

    def text(self, step: int, tag: str, text: str) -> None:
        """Show ``text`` (markdown) among the pictures."""
        self._writers.text(step, tag, text)

    def close(self) -> None:
        """Close the files, and let the writers finish."""
        self._lines.close()
        self._details.close()
        self._writers.close()

    def _line(self, record: Logged) -> str:
        parts = [f"step {record['step']:>{len(str(self.total_steps))}}/{self.total_steps}"]
        metrics = tuple(
            (name, "{:.4f}")
            for name, value in record.items()
            if name.startswith("validation_") and isinstance(value, float)
        )
        parts += [
            f"{name} {form.format(record[name])}"
            for name, form in dict(CONSOLE + metrics).items()
            if record.get(name) is not None
        ]
        left = timedelta(seconds=int((self.total_steps - record["step"]) * record["step_s"]))
        parts += [
            f"{tqdm.format_sizeof(record['tokens_per_s'])} tokens/s",
            f"data wait {record['data_wait_s'] / max(record['step_s'], 1e-9):.0%}",
            f"left {left}",
        ]
        return "  ".join(parts)


class _Line(Record):
    attempt: Count = 0
