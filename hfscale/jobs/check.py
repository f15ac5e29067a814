"""Do the parts of a run fit together? See ``run/shape.py``."""

from __future__ import annotations

from hfscale.config.schema import TrainConfig
from hfscale.run.run import Run


def check(config: TrainConfig) -> None:
    """Return if they do, as ``Run.check``."""
    Run(config).check()


def parameters(config: TrainConfig) -> int:
    """Return how many weights the model of a run has."""
    return Run(config).shape.parameters
