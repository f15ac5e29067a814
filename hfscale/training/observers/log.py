"""The figures of a step, and the files that they are written to."""

from __future__ import annotations

from dataclasses import dataclass, field

from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.state import CheckpointState
from hfscale.engine.engine import Engine
from hfscale.log import logger
from hfscale.monitor.heartbeat import beat
from hfscale.monitor.metrics_log import Logged, MetricsLog
from hfscale.monitor.throughput import Throughput, peak_memory_gib
from hfscale.stream.digest import VERSION as DIGEST_VERSION
from hfscale.stream.examples import ExampleStream
from hfscale.stream.loader import Stream
from hfscale.training.accounting import SKIPPED, Accounting
from hfscale.training.observers.base import Observer, Step


@dataclass
class Figures(Observer):
    """Measures every ``every_steps``-th step, and each other one that is watched. Every rank takes
    part in the sums.
    """

    engine: Engine
    stream: Stream | ExampleStream
    accounting: Accounting
    checkpoints: CheckpointManager
    throughput: Throughput
    every_steps: int
    sources: tuple[str, ...] = ("text",)  # names, as the rows number them
    warned_s: float | None = None  # in a Slurm job: how long before its end ranks are told to save
    latest: Logged = field(default_factory=dict)  # of the last watched step

    def wants(self, step: int) -> bool:
        """Return whether ``step`` is logged."""
        return step % self.every_steps == 0

    def look(self, step: Step) -> None:
        """Put the losses, rates and times of ``step`` into its figures."""
        if not step.watched:
            return
        beat("collective")
        losses = self.accounting.global_losses(step.agreed.counts, sources=self.sources)
        self.latest = step.figures
        self.latest |= {
            "step": step.number,
            **losses.of_all,
            **({"source_loss": losses.of_source} if losses.of_source else {}),
            "lr": step.stats.lr,
            "grad_norm": step.stats.grad_norm,
            "tokens_seen": step.tokens_seen,
            **self.throughput.report(),
            **self.stream.epochs(),
            "batch_digest": step.agreed.digest % 2**64,
            "digest_version": DIGEST_VERSION,
            "memory_gib": peak_memory_gib(self.engine.device),
        }
        if step.skipped_rows:
            self.latest[SKIPPED] = step.skipped_rows
        if self.checkpoints.save_s:
            self.latest["save_s"] = self.checkpoints.save_s
            self._check_warning_time(self.latest["save_s"] + self.latest["step_s"])

    def _check_warning_time(self, needed_s: float) -> None:
        """Say once if Slurm's signal leaves less time than a step and a save take."""
        if self.warned_s is not None and needed_s > self.warned_s:
            logger.warning(
                f"step and save take {needed_s:.0f} s, but Slurm warns {self.warned_s:.0f} s "
                "before the end: the next job of "
                f"this run wants cluster.signal_s={2 * needed_s:.0f} (sbatch "
                f"--signal=USR1@{2 * needed_s:.0f})"
            )
            self.warned_s = None

    def state(self) -> dict[str, object]:
        """Return the losses of the last watched step, and its validation."""
        kept = {
            name: value
            for name, value in self.latest.items()
            if name == "step" or "loss" in name or name.startswith("validation_")
        }
        return {"metrics": kept}


class Log(Observer):
    """Writes the figures. On rank 0 only."""

    def __init__(self, writer: MetricsLog) -> None:
        self.writer = writer

    def rewind(self, saved: CheckpointState) -> None:
        """Have pictures end at ``saved``; in the record the last line of a step counts."""
        self.writer.rewind(saved.step + 1)

    def look(self, step: Step) -> None:
        """Write the figures of ``step``, if it has any."""
        if step.figures:
            self.writer.write(step.figures, step.details)

    def close(self) -> None:
        """Close the files."""
        self.writer.close()
