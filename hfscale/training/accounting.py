"""What the ranks count of a step together: items of each term of the loss, tokens, skipped rows,
and the losses that come of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch

from hfscale.dist.agree import sum_over_ranks
from hfscale.errors import DataError
from hfscale.objectives.base import Batch, Objective
from hfscale.stream.examples import Examples
from hfscale.stream.rows import Rows

# among what the ranks agree on; the first also in the metrics and in a checkpoint's state
SKIPPED, TOKENS = "skipped_rows", "tokens"
# data.max_skipped counts these many rows as read from the start (at most an epoch): damage comes in
# lumps
SKIP_FLOOR_ROWS = 2**20


def counts_of(
    objective: Objective, rows: Sequence[Rows | Examples], batches: Sequence[Batch]
) -> dict[str, int]:
    """Return this rank's part of the counts of a step: of each term, of tokens and skipped rows."""
    skipped = sum(int((~micro.valid_B).sum()) for micro in rows)
    tokens = sum(row.numel() for batch in batches for row in batch.rows())
    return objective.counts(batches) | {SKIPPED: skipped, TOKENS: tokens}


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


def global_losses(
    objective: Objective, counts: Mapping[str, int], *, sources: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the ``loss`` of what ``objective.losses`` went through on all ranks, its terms, and
    ``source_loss`` where there are several.

    ``counts`` are those of all ranks. Where nothing was asked (all rows skipped) a loss is NaN, not
    0.
    """
    sums, weights = objective.take_sums(), objective.weights()
    names = sorted(sums)
    totals_of_ranks = sum_over_ranks(torch.stack([sums[name] for name in names]))
    by_source = dict(zip(names, totals_of_ranks.tolist(), strict=True))
    means = {term: sum(totals) / (counts[term] or nan) for term, totals in by_source.items()}
    trained = [term for term in names if weights[term]]
    losses: dict[str, Any] = {"loss": sum(weights[term] * means[term] for term in trained)}
    reported = objective.report(means)
    losses |= {term: reported[term] for term in names if not weights[term]}
    if len(trained) > 1:
        losses |= {f"loss_{term}": means[term] for term in trained}

    def of_source(number: int) -> float | None:
        counted = {term: counts[f"{term}/{number}"] for term in trained}
        asked = [term for term in trained if counted[term]]
        if not asked:
            return None  # no row of it was in this step
        return sum(weights[term] * by_source[term][number] / counted[term] for term in asked)

    if len(sources) > 1:
        losses["source_loss"] = {name: of_source(number) for number, name in enumerate(sources)}
    return losses
