"""Rows as the stream gives them, made from lists of documents."""

from __future__ import annotations

import torch

from hfscale.stream.rows import Rows


def make_rows(
    documents: list[list[int]], *, valid: list[bool] | None = None, seed: int = 0, vocab: int = 320
) -> Rows:
    """Return rows whose documents have these lengths (each row's lengths sum to T + 1), with random
    ids.
    """
    ids_BL = torch.randint(
        vocab, (len(documents), sum(documents[0])), generator=torch.Generator().manual_seed(seed)
    )
    B, L = len(documents), sum(documents[0]) - 1
    ends = [
        b * L + sum(row[:k]) - 1
        for b, row in enumerate(documents)
        for k in range(1, len(row))
        if sum(row[:k]) <= L
    ]
    boundaries = torch.tensor(ends, dtype=torch.int64)
    return Rows(
        ids_BL,
        boundaries,
        torch.tensor(valid or [True] * B),
        torch.zeros(B, dtype=torch.int16),
        torch.arange(B),
    )


def cut_rows(rows: Rows, first: int, stop: int) -> Rows:
    """Return the rows ``first`` to ``stop`` of a micro-batch, as a smaller one."""
    cut, boundaries = slice(first, stop), rows.boundaries
    if boundaries is not None:
        L = rows.ids_BL.shape[1] - 1
        boundaries = boundaries[(first * L <= boundaries) & (boundaries < stop * L)] - first * L
    return Rows(
        rows.ids_BL[cut], boundaries, rows.valid_B[cut], rows.source_B[cut], rows.position[cut]
    )
