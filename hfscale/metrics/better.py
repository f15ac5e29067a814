"""Which way a figure of a validation is better. Needs nothing: a config is checked by it."""

from __future__ import annotations

# all others are better the higher they are; ``loss_`` and a name is a term of the loss
LOWER = frozenset({"loss", "perplexity", "bits_per_byte", "mse", "alignment", "uniformity"})


def lower_is_better(figure: str) -> bool:
    """Return whether less of ``figure``, as ``metrics.jsonl`` names it, is better."""
    name = figure.removeprefix("validation_")
    return name in LOWER or name.startswith("loss_")
