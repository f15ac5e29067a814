"""Rows as the stream gives them, made from lists of documents."""
from __future__ import annotations

import torch

from hfscale.stream.rows import Rows


def make_rows(documents: list[list[int]], *, valid: list[bool] | None = None, seed: int = 0, vocab: int = 320) -> Rows:
    """Return rows whose documents have these lengths (each row's lengths sum to T + 1), with random ids."""
    ids_BL = torch.randint(vocab, (len(documents), sum(documents[0])), generator=torch.Generator().manual_seed(seed))
    B, L = len(documents), sum(documents[0]) - 1
    ends = [b * L + sum(row[:k]) - 1 for b, row in enumerate(documents) for k in range(1, len(row)) if sum(row[:k]) <= L]
    boundaries = torch.tensor(ends, dtype=torch.int64)
    return Rows(ids_BL, boundaries, torch.tensor(valid or [True] * B), torch.zeros(B, dtype=torch.int16), torch.arange(B))
