"""Where a run's figures go: ``metrics.jsonl`` (the record), TensorBoard (the picture) and the
console (one line).

Only rank 0 holds a ``MetricsLog``. A resumed run appends: a step that is logged again carries a
higher ``attempt``, and TensorBoard drops what the earlier attempt wrote for the steps that are
repeated.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hfscale import run_files
from hfscale.log import logger
from hfscale.monitor.fence import Fence
from hfscale.monitor.lines import Lines, finite
from hfscale.records import Count, Record, parse

CONSOLE = (
    ("loss", "{:.4f}"),
    ("validation_loss", "{:.4f}"),
    ("lr", "{:.2e}"),
    ("grad_norm", "{:.3f}"),
    ("mfu", "{:.1%}"),
    ("skipped_rows", "{:,}"),
)


class MetricsLog:
    """Appends one record a logged step. ``first_step`` is the first step that this attempt will
    log.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        first_step: int,
        total_steps: int,
        tensorboard: bool,
        fence: Fence | None = None,
    ) -> None:
        self.run_dir, self.total_steps = run_dir, total_steps
        self._lines = Lines(run_dir / run_files.METRICS, fence=fence)
        before = parse(_Line, self._lines.last).attempt if self._lines.last else 0
        self.attempt = before + 1
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / run_files.TENSORBOARD), purge_step=first_step)

    def write(self, record: dict[str, Any]) -> None:
        """Write one step's record everywhere. Values are numbers, None, or dicts of numbers; what
        is not finite becomes None.

        Raises:
            SupersededError: if a younger attempt has begun; nothing is written then.
        """
        record = {name: finite(value) for name, value in record.items()}
        self._lines.append({**record, "attempt": self.attempt})
        if self._board is not None:
            for name, value in _flat(record):
                if name not in ("step", "batch_digest", "digest_version"):
                    self._board.add_scalar(name, value, record["step"])
            self._board.flush()
        logger.info(self._line(record))

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()

    def _line(self, record: dict[str, Any]) -> str:
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


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return ``record`` as (name, number) pairs; nested names are joined by a slash and None is
    left out.
    """
    pairs: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}/")
        elif value is not None:
            pairs.append((prefix + name, float(value)))
    return pairs
