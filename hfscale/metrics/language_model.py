"""Perplexity a token, and bits a byte: the one to compare over tokenizers. Examples are documents."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np

from hfscale.metrics.measure import Measure, Scores, from_sums, paired


def language_model(
    nats: Sequence[float], tokens: Sequence[int], utf8_bytes: Sequence[int]
) -> Measure:
    """Return ``loss`` (nats a token), ``perplexity`` and ``bits_per_byte``, from each document's summed loss, and its tokens and bytes.

    Raises:
        DataError: if there are no documents.
    """
    paired(nats, tokens)

    def finish(sums: np.ndarray) -> Scores:
        total, count, size = sums.T
        return {
            "loss": total / count,
            "perplexity": np.exp(np.minimum(total / count, 700.0)),
            "bits_per_byte": total / size / log(2),
        }

    return from_sums(np.array([nats, tokens, utf8_bytes], dtype=float).T, finish)
