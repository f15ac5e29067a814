"""How well rankings find what is relevant. Scores are in [0, 1]."""
from __future__ import annotations

from collections.abc import Collection, Sequence

from hfscale.metrics.measure import Measure, mean, paired


def retrieval(rankings: Sequence[Sequence[str]], relevant: Sequence[Collection[str]]) -> Measure:
    """Return ``accuracy`` (the first is relevant), ``recall_at_10`` (one of ten is), ``mrr``: the mean of 1 / rank, 0 if not found.

    Args:
        rankings: for each query the ids found, best first.
        relevant: for each query the ids that are right.

    Raises:
        DataError: if there are no queries.
    """
    paired(rankings, relevant)
    ranks = [next((rank for rank, name in enumerate(ranking, 1) if name in right), float("inf"))
             for ranking, right in zip(rankings, relevant, strict=True)]
    within = {name: [rank <= k for rank in ranks] for name, k in {"accuracy": 1, "recall_at_10": 10}.items()}
    return mean({**within, "mrr": [1 / rank for rank in ranks]})
