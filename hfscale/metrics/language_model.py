"""Perplexity a token, and bits a byte: the one to compare over tokenizers. Examples are
documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np

from hfscale.metrics.measure import Measure, Scores, from_sums, paired


def language_model(
    nats: Sequence[float], tokens: Sequence[int], utf8_bytes: Sequence[int] | None
) -> Measure:
    """Return ``loss`` (nats a token), ``perplexity`` and ``bits_per_byte``, from each document's
    summed loss, and its tokens and bytes; no bits where the bytes are not known (None).

    Raises:
        DataError: if there are no documents.
    """
    paired(nats, tokens)

    def finish(sums: np.ndarray) -> Scores:
        total, count, size = sums.T
        scores = {
            "loss": total / count,
            "perplexity": np.exp(np.minimum(total / count, 700.0)),
        }
        return scores if utf8_bytes is None else {**scores, "bits_per_byte": total / size / log(2)}

    sizes = utf8_bytes if utf8_bytes is not None else [0] * len(nats)
    return from_sums(np.array([nats, tokens, sizes], dtype=float).T, finish)
