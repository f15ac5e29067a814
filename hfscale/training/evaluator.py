"""Held-out loss: every validation row counted once, whatever the number of ranks."""
from __future__ import annotations

from collections.abc import Iterable
from math import exp, nan

import torch

from hfscale.dist.agree import sum_over_ranks
from hfscale.engine.engine import Engine
from hfscale.objectives.base import Objective
from hfscale.stream.rows import Rows


class Evaluator:
    """Scores ``objective`` on fixed rows. Every rank gets as many micro-batches, so ZeRO 3 never waits for one that has none."""

    def __init__(self, objective: Objective, rows: Iterable[Rows]) -> None:
        self._objective, self._rows = objective, rows

    @torch.no_grad()
    def run(self, engine: Engine) -> dict[str, float]:
        """Return ``loss`` (nats an item, all ranks together) and ``perplexity``; the engine's mode is restored."""
        terms: dict[str, list[torch.Tensor]] = {}
        counts: dict[str, int] = {}
        with engine.eval_mode():
            for rows in self._rows:
                batch = self._objective.collate(rows)
                for name, count in self._objective.counts([batch]).items():
                    counts[name] = counts.get(name, 0) + count
                for name, sums_B in self._objective.loss(engine, batch.to(engine.device)).items():
                    terms.setdefault(name, []).append(sums_B.detach().double().sum())
        names = sorted(terms)
        totals = sum_over_ranks(torch.tensor([[torch.stack(terms[name]).sum().item(), counts[name]] for name in names]))
        loss = sum(self._objective.weights()[name] * total / (count or nan)  # no row could be read: no loss, not a loss of 0
                   for name, (total, count) in zip(names, totals.tolist(), strict=True))
        return {"loss": loss, "perplexity": exp(min(loss, 700.0))}
