"""The best validation yet is saved, and a run that gets no better for long enough ends."""

from __future__ import annotations

import math

from hfscale.checkpoint.state import Best, CheckpointState
from hfscale.config import schema
from hfscale.errors import ConfigError, nearest
from hfscale.monitor.metrics_log import Logged
from hfscale.training.observers.base import Observer, Step


class KeepBest(Observer):
    """Asks for a save of each validation with the best value yet of ``best.metric``, and for a stop
    after ``patience`` validations without one; a resume goes on counting from ``saved``.
    """

    def __init__(
        self, best: schema.Best, *, patience: int | None = None, saved: Best | None = None
    ) -> None:
        self._metric, self._lower, self._patience = best.metric, best.mode == "min", patience
        self._best = saved  # perhaps of another metric, if the config was changed meanwhile
        self._count()

    def look(self, step: Step) -> None:
        """Compare the validation of ``step``, if it has one.

        Raises:
            ConfigError: if the metric is not among its figures.
        """
        self.save = self._improves(step.figures)
        self._count()

    def rewind(self, saved: CheckpointState) -> None:
        """Take over the best value of then."""
        self._best, self.save = saved.best, False
        self._count()

    def state(self) -> dict[str, object]:
        """Return the best value, and since when it stands."""
        return {"best": self._best}

    def _improves(self, figures: Logged) -> bool:
        given = [name for name in figures if name.startswith("validation_")]
        if not given:
            return False
        if self._metric not in given:
            raise ConfigError(
                "no validation gives this metric",
                where="checkpoint.keep_best.metric",
                value=self._metric,
                remedy=nearest(self._metric, given),
            )
        value, best = figures[self._metric], self._best
        if best is not None and best.metric != self._metric:
            best = None
        if not math.isfinite(value) or (best and not self._better(value, best.value)):
            if best:
                self._best = best.model_copy(update={"stale": best.stale + 1})
            return False
        self._best = Best(metric=self._metric, step=figures["step"], value=value, stale=0)
        return True

    def _better(self, value: float, before: float) -> bool:
        return value < before if self._lower else value > before

    def _count(self) -> None:
        stale = self._best.stale if self._best else 0
        enough = self._patience is not None and stale >= self._patience
        self.stop = f"no new best in {stale} validations: train.patience" if enough else ""
