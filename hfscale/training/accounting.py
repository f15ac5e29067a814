"""What the ranks count of a step together, and what comes of it: the scale of each backward, and
the losses of the whole step.

An objective gives *sums* per row and term. The step divides by the global count, so how a batch is
cut into micro-batches and ranks does not change the gradient:

    gradient of  sum over terms  weight * (sum over all rows of all ranks) / (global count)

Each backward gets ``weight * its sum * data.size / global count``: the engine averages gradients
over the ranks of ``data``. Shape legend: B rows, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan

import torch
from torch import Tensor

from hfscale.dist.agree import sum_over_ranks
from hfscale.errors import DataError
from hfscale.objectives.base import ROUTER, Batch, Forward, Model, Objective
from hfscale.stream.examples import Examples
from hfscale.stream.rows import Rows
from hfscale.training.balanced import balanced, routed

# each rank's part of the loss of the step before, in whole units of 1 / LOSS_UNITS, so that their
# sum is exact; and how many ranks have one that is none
LOSS, NO_LOSS = "loss_before", "no_loss_before"
LOSS_UNITS = 2.0**32
MOST_LOSS = 2.0**28
# among what the ranks agree on; the first also in the metrics and in a checkpoint's state
SKIPPED, TOKENS = "skipped_rows", "tokens"
# for pictures: positions of the batches, padding included; rows whose documents are known, and
# parts of documents in them
POSITIONS, ROWS, DOCUMENTS = "positions", "rows", "documents"
# data.max_skipped counts these many rows as read from the start (at most an epoch): damage comes in
# lumps
SKIP_FLOOR_ROWS = 2**20


@dataclass(frozen=True)
class Losses:
    """What a step, or a validation, comes to."""

    of_all: dict[str, float]  # ``loss``, and its terms where there are several
    of_source: dict[str, float | None]  # by name where there are several; None: no row of it


class Accounting:
    """The books of ``objective``: what is asked of its rows, what they gave, and the losses of
    both. Those of a step are closed by ``global_losses``.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._sums: dict[str, Tensor] = {}

    def counts(self, batches: Iterable[Batch]) -> dict[str, int]:
        """Return ``{term: n}``, the scored items of these micro-batches, and ``{term/source: n}``
        where there are several sources.

        Sum over ranks gives the global counts.
        """
        totals = dict.fromkeys(self.objective.weights(), 0)
        for batch in batches:
            counts = dict(batch.counts)
            if self.objective.balancing:
                counts[ROUTER] = routed(self.objective, batch).sum(1)
            for term, count_B in counts.items():
                by_source = self._by_source(count_B, batch).tolist()
                totals[term] += sum(by_source)
                if len(by_source) > 1:
                    for number, count in enumerate(by_source):
                        name = f"{term}/{number}"
                        totals[name] = totals.get(name, 0) + count
        return totals

    def losses(
        self, model: Model, batches: Iterable[Batch], global_counts: Mapping[str, int]
    ) -> Iterator[Tensor]:
        """Yield one scalar for each backward of the step, ``weight * sum * data.size / global
        count``; fp32. What was measured is there for ``global_losses`` at the end of the step.
        """
        self._sums = {}
        size = self.objective.setting.data.size
        scales = {
            term: weight * size / max(1, global_counts[term])
            for term, weight in self.objective.weights().items()
            if weight
        }
        for forward in self._forwards(model, batches, scales, global_counts):
            self.record(forward.sums, forward.batch)
            if forward.surrogate is not None:
                yield forward.surrogate
                continue
            terms = [term for term in scales if term in forward.sums]
            yield torch.stack([scales[term] * forward.sums[term].sum() for term in terms]).sum()

    def _forwards(
        self,
        model: Model,
        batches: Iterable[Batch],
        scales: Mapping[str, float],
        global_counts: Mapping[str, int],
    ) -> Iterator[Forward]:
        objective = self.objective
        if objective.balancing and torch.is_grad_enabled():
            return balanced(objective, model, list(batches), tokens=global_counts[ROUTER])
        return objective.forwards(model, batches, scales)

    def record(self, sums: Mapping[str, Tensor], batch: Batch) -> None:
        """Add the ``{term: sums_B}`` of ``batch`` to the books, without waiting for the device."""
        for term, sums_B in sums.items():
            total = self._by_source(sums_B.detach().double(), batch)
            self._sums[term] = self._sums[term] + total if term in self._sums else total

    def loss_share(self, global_counts: Mapping[str, int]) -> Tensor:
        """Return this rank's part (fp64, on its device) of the loss of the step just made; the
        books stay open.
        """
        weights, sums = self.objective.weights(), self._sums
        trained = [term for term in sums if weights[term]]
        parts = [weights[term] * sums[term].sum() / max(1, global_counts[term]) for term in trained]
        return torch.stack(parts).sum()

    def take_sums(self) -> dict[str, Tensor]:
        """Return ``{term: sum of each source}`` (fp64) of this rank's part of the step just made,
        and forget it.
        """
        sums, self._sums = self._sums, {}
        return sums

    def _by_source(self, values_B: Tensor, batch: Batch) -> Tensor:
        """Return the sum of the values of each source, in their type."""
        sources = self.objective.setting.sources
        if sources == 1:
            return values_B.sum()[None]
        source_B = batch.source_B.to(values_B.device, torch.int64, non_blocking=True)
        return values_B.new_zeros(sources).index_add(0, source_B, values_B)

    def global_losses(self, counts: Mapping[str, int], *, sources: tuple[str, ...] = ()) -> Losses:
        """Return the losses of what ``losses`` went through on all ranks. Collective.

        ``counts`` are those of all ranks. Where nothing was asked (all rows skipped) a loss is NaN,
        not 0.
        """
        sums, weights = self.take_sums(), self.objective.weights()
        names = sorted(sums)
        totals_of_ranks = sum_over_ranks(torch.stack([sums[name] for name in names]))
        by_source = dict(zip(names, totals_of_ranks.tolist(), strict=True))
        means = {term: sum(totals) / (counts[term] or nan) for term, totals in by_source.items()}
        trained = [term for term in names if weights[term]]
        losses = {"loss": sum(weights[term] * means[term] for term in trained)}
        reported = self.objective.report(means)
        losses |= {term: reported[term] for term in names if not weights[term]}
        if len(trained) > 1:
            losses |= {f"loss_{term}": means[term] for term in trained}

        def of_source(number: int) -> float | None:
            counted = {term: counts[f"{term}/{number}"] for term in trained}
            asked = [term for term in trained if counted[term]]
            if not asked:
                return None  # no row of it was in this step
            terms = (weights[term] * by_source[term][number] / counted[term] for term in asked)
            return float(sum(terms))

        several = sources if len(sources) > 1 else ()
        return Losses(losses, {name: of_source(number) for number, name in enumerate(several)})


def counts_of(
    accounting: Accounting, rows: Sequence[Rows | Examples], batches: Sequence[Batch]
) -> dict[str, int]:
    """Return this rank's part of the counts of a step: of each term, of tokens and skipped rows."""
    skipped = sum(int((~micro.valid_B).sum()) for micro in rows)
    tokens = sum(row.numel() for batch in batches for row in batch.rows())
    asked = [micro.boundaries for micro in rows if isinstance(micro, Rows)]
    boundaries = [one for one in asked if one is not None]  # nobody asked, or of all micro-batches
    known = sum(len(micro.valid_B) for micro in rows) if boundaries else 0
    return accounting.counts(batches) | {
        SKIPPED: skipped,
        TOKENS: tokens,
        POSITIONS: sum(batch.input_ids.numel() for batch in batches),
        ROWS: known,
        DOCUMENTS: known + sum(map(len, boundaries)),
    }


def agree_on_counts(
    accounting: Accounting, rows: Sequence[Rows | Examples], batches: Sequence[Batch]
) -> dict[str, int]:
    """Return the counts of a step that is only tried, of all ranks."""
    own = counts_of(accounting, rows, batches)
    totals = sum_over_ranks(torch.tensor([own[name] for name in sorted(own)], dtype=torch.float64))
    return {name: int(n) for name, n in zip(sorted(own), totals.tolist(), strict=True)}


def told_of_loss(share: torch.Tensor | None) -> dict[str, int]:
    """Return what a rank tells the others of its part of a loss (a scalar on the host)."""
    value = 0.0 if share is None else float(share)
    if not abs(value) < MOST_LOSS:  # nor NaN
        return {LOSS: 0, NO_LOSS: 1}
    return {LOSS: round(value * LOSS_UNITS), NO_LOSS: 0}


def heard_of_loss(counts: Mapping[str, int]) -> float:
    """Return the loss that all ranks have told of; infinite if one of them has none."""
    return inf if counts[NO_LOSS] else counts[LOSS] / LOSS_UNITS


def check_skipped(
    skipped_rows: int, *, share: float, consumed_rows: int, epoch_rows: int, step: int
) -> None:
    """Return if a run that has read ``consumed_rows`` may go on after ``skipped_rows`` damaged
    ones; all ranks know the same numbers.

    Raises:
        DataError: on all of them, if there are more than ``share`` of what was read.
    """
    allowed = share * max(consumed_rows, min(epoch_rows, SKIP_FLOOR_ROWS))
    if skipped_rows > allowed:
        raise DataError(
            "more data is damaged than data.max_skipped allows",
            where=f"step {step}",
            value=f"{skipped_rows:,} rows skipped of {consumed_rows:,} read, {int(allowed):,} "
            "allowed",
            remedy="restore the shards that the log names (`hfscale shards verify` lists "
            "all damage), or raise it",
        )
