"""Held-out loss: every validation row counted once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import exp
from typing import TYPE_CHECKING

import numpy as np
import torch

from hfscale.dist.agree import from_all_ranks, from_rank_0, sum_over_ranks
from hfscale.monitor.heartbeat import beat
from hfscale.objectives.base import Objective
from hfscale.stream.examples import Examples
from hfscale.stream.rows import Rows
from hfscale.tasks.base import Example, Output, Task
from hfscale.training.accounting import Accounting

if TYPE_CHECKING:  # a login node checks a run without DeepSpeed
    from hfscale.engine.engine import Engine


class Evaluator:
    """Scores ``objective`` on fixed rows. Every rank gets as many micro-batches, so ZeRO 3 never
    waits for one that has none.
    """

    def __init__(self, objective: Objective, rows: Iterable[Rows]) -> None:
        self._objective, self._rows = objective, rows

    @torch.no_grad()
    def run(self, engine: Engine) -> dict[str, float]:
        """Return the validation loss and what else the objective reports (all ranks together); the
        engine's mode is restored.
        """
        objective, accounting = self._objective, Accounting(self._objective)
        beat("validation")
        batches = [objective.collate(rows) for rows in self._rows]
        counts = accounting.counts(batches)
        names = sorted(counts)
        counts = dict(
            zip(
                names,
                sum_over_ranks(torch.tensor([counts[name] for name in names])).long().tolist(),
                strict=True,
            )
        )
        with engine.eval_mode():
            for _ in accounting.losses(
                engine, (batch.to(engine.device) for batch in batches), counts
            ):
                beat("validation")  # what was measured is in the sums
        losses = accounting.global_losses(counts).of_all
        return losses | (
            {"perplexity": exp(min(losses["loss"], 700.0))} if objective.token_loss else {}
        )


class TaskEvaluator:
    """Scores a task on a whole split: its loss, and its metrics over predictions of which each
    example has one, whatever the ranks.
    """

    def __init__(
        self, task: Task, rows: Iterable[Examples], *, examples: Sequence[Example], of: np.ndarray
    ) -> None:
        """``of`` is the number of the example of each feature. Only rank 0 uses ``examples``."""
        self._task, self._rows, self._examples, self._of = task, rows, examples, of

    @torch.no_grad()
    def run(self, engine: Engine) -> dict[str, float]:
        """Return the validation loss and metrics (all ranks together); the engine's mode is
        restored.
        """
        task, accounting = self._task, Accounting(self._task)
        counts = dict.fromkeys(task.weights(), 0)
        outputs = dict[int, Output]()
        with engine.eval_mode():
            for rows in self._rows:
                batch = task.collate(rows)
                counts = {term: counts[term] + n for term, n in accounting.counts([batch]).items()}
                sums, made = task.judge(engine, batch.to(engine.device), rows)
                accounting.record(sums, batch)
                outputs |= {
                    int(number): output
                    for number, valid, output in zip(rows.position, rows.valid_B, made, strict=True)
                    if valid
                }
        totals = (
            sum_over_ranks(torch.tensor([counts[term] for term in sorted(counts)])).long().tolist()
        )
        losses = accounting.global_losses(dict(zip(sorted(counts), totals, strict=True))).of_all
        gathered = {
            number: output for part in from_all_ranks([*outputs.items()]) for number, output in part
        }
        scores = from_rank_0(self._score(gathered) if self._examples else {})
        return losses | scores

    def _score(self, outputs: Mapping[int, Output]) -> dict[str, float]:
        ends = np.searchsorted(self._of, np.arange(len(self._examples)), side="right").tolist()
        cuts = zip([0, *ends], ends, self._examples)
        predictions = [
            {
                "id": example["id"],
                **self._task.answer(example, [outputs[n] for n in range(begin, end)]),
            }
            for begin, end, example in cuts
        ]
        return self._task.score(predictions, self._examples)
