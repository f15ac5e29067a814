"""Held-out loss and metrics, every so many steps and at the last one."""

from __future__ import annotations

from dataclasses import dataclass

from hfscale.engine.engine import Engine
from hfscale.training.evaluator import Evaluator, TaskEvaluator
from hfscale.training.observers.base import Observer, Step


@dataclass
class Validate(Observer):
    """Adds what ``evaluator`` finds to the figures, each as ``validation_`` and its name."""

    engine: Engine
    evaluator: Evaluator | TaskEvaluator
    every_steps: int
    total_steps: int

    def wants(self, step: int) -> bool:
        """Return whether ``step`` is validated."""
        return step % self.every_steps == 0 or step == self.total_steps

    def look(self, step: Step) -> None:
        """Evaluate, if it is time; the engine's mode is restored."""
        if self.wants(step.number):
            scores = self.evaluator.run(self.engine)
            step.figures.update({f"validation_{name}": value for name, value in scores.items()})
