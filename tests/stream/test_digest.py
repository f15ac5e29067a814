from __future__ import annotations

import hashlib

import pytest
import torch

from hfscale.stream.digest import batch_digest


def test_it_is_the_sum_of_the_rows_digests():
    ids = torch.tensor([[1, 2, 3], [2**40, -1, 0]])
    rows = [b"".join(v.to_bytes(8, "little", signed=True) for v in row) for row in ids.tolist()]
    expected = sum(
        int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little") for row in rows
    )
    assert batch_digest([ids]) % 2**64 == expected % 2**64
    assert -(2**63) <= batch_digest([ids]) < 2**63


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_every_cut_gives_the_same_number(parts):
    """Also as views of longer rows, in another order, as another integer type, and summed as int64, which wraps."""
    ids = torch.randint(0, 50_000, (64, 33), generator=torch.Generator().manual_seed(0))
    ranks = [
        [c.to(torch.int32)[:, :-1] for c in part.chunk(2)] for part in ids.flip(0).chunk(parts)
    ]
    summed = torch.tensor([batch_digest(rank) for rank in ranks]).sum().item()
    assert summed == batch_digest([ids[:, :-1]])


def test_one_changed_id_changes_it():
    ids = torch.zeros((4, 8), dtype=torch.int64)
    other = ids.clone()
    other[3, 7] = 1
    assert batch_digest([ids]) != batch_digest([other])
    assert batch_digest([]) == 0
