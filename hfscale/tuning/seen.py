"""What a trial is told, and what its ranks leave: two small files in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from hfscale.shards.files import write_atomically

TRIAL, SEEN = "trial.json", "seen-{}.json"
Outcome = Literal["done", "memory", "diverged"]


@dataclass(frozen=True)
class Trial:
    """What is tried: so many ``steps``; in ``memory_gib`` of a rank (0: what there is); with a
    learning rate that rises from the first of ``rates`` to the last, where there are two.
    """

    steps: int
    memory_gib: float = 0.0
    rates: list[float] = field(default_factory=list)


@dataclass
class Seen:
    """What a rank saw: of each step seconds, tokens/s of all ranks, the part of it that waited for
    data, loss and rate.
    """

    outcome: Outcome = "done"
    why: str = ""
    step_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    peak_gib: float = 0.0  # resident, or on a GPU reserved: with what is lost between tensors

    def write(self, folder: Path, rank: int) -> None:
        """Leave it in ``folder``."""
        write_atomically(folder / SEEN.format(rank), json.dumps(asdict(self)).encode())
