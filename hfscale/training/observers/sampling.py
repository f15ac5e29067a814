"""Texts that the model writes after every so many validations, for people to read."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hfscale.engine.engine import Engine
from hfscale.log import logger
from hfscale.monitor.heartbeat import beat
from hfscale.monitor.lines import Lines
from hfscale.monitor.metrics_log import MetricsLog
from hfscale.training.observers.base import Observer, Step
from hfscale.training.sampler import Sampler, markdown


@dataclass
class Sampling(Observer):
    """Writes them to samples.jsonl and among the pictures, where rank 0 has a ``log``. A model that
    cannot write is said once, and left alone.
    """

    engine: Engine
    sampler: Sampler
    every_steps: int
    total_steps: int
    log: MetricsLog | None = None
    lines: Lines | None = None  # with a log
    _failed: bool = False

    def look(self, step: Step) -> None:
        """Let the model write, if it is time; the engine's mode is restored."""
        due = step.number % self.every_steps == 0 or step.number == self.total_steps
        if self._failed or not due:
            return
        beat("validation")
        try:
            with self.engine.eval_mode():
                samples = self.sampler.write(self.engine)
        # whatever generate() of a strange architecture raises, alike on all ranks
        except Exception as error:
            self._failed = True
            logger.warning(
                f"no samples of text from here on: {type(error).__name__}: {str(error)[:300]}"
            )
            return
        if self.log and self.lines:
            kind, attempt = self.sampler.kind, self.log.attempt
            for sample in samples:
                about = {"step": step.number, "attempt": attempt, "kind": kind}
                self.lines.append(about | asdict(sample))
            self.log.text(step.number, f"samples/{kind}", markdown(samples))

    def close(self) -> None:
        """Close the file."""
        if self.lines:
            self.lines.close()
