"""What looking at a step costs the ranks: one collective a step, three more where it is logged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist

from tests.helpers.corpus import run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

STEPS = 6


def collectives(values: dict[str, Any]) -> list[int]:
    """Return how many collectives each step asks of the host's group, beside those of the engine
    and of what is done once.
    """
    from hfscale.training.loop import Trainer

    counts: list[int] = []
    own = {name: getattr(torch_dist, name) for name in ("all_reduce", "all_gather")}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if counts and sys._getframe(1).f_globals["__name__"] == "hfscale.dist.agree":
                counts[-1] += 1
            return own[name](*args, **kwargs)

        return call

    step = Trainer._step

    def begin(trainer: Trainer) -> Any:
        counts.append(0)
        return step(trainer)

    Trainer._step = begin  # type: ignore[method-assign]
    for name in own:
        setattr(torch_dist, name, counted(name))
    try:
        train(values)
    finally:
        Trainer._step = step  # type: ignore[method-assign]
        for name, function in own.items():
            setattr(torch_dist, name, function)
    return counts[-STEPS:]  # before them the trial


def test_a_logged_step_has_two_collectives_more_than_its_losses(corpus: Path, tmp_path: Path):
    metrics = {"every_steps": 3, "tensorboard": True}
    values = run_values(
        corpus,
        tmp_path,
        "run",
        train={"steps": STEPS},
        metrics=metrics,
        checkpoint={"async": False},
    )
    # agreement; the losses; layers, and phases with memory
    quiet, logged = 1, 1 + 1 + 2
    counts = run_ranks(collectives, 2, values)[0]
    assert counts[:5] == [quiet, quiet, logged, quiet, quiet]
    assert counts[5] >= logged, "the last step is saved beside"
