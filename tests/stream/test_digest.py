from __future__ import annotations

import hashlib

import pytest
import torch

from hfscale.stream.digest import batch_digest, digest_rows, step_digest
from hfscale.stream.examples import Examples
from hfscale.stream.rows import Rows


def rows(ids: torch.Tensor) -> Rows:
    n = torch.zeros(len(ids), dtype=torch.int64)
    return Rows(ids, None, n.bool(), n, n)


def examples(*features: dict) -> Examples:
    n = torch.zeros(len(features), dtype=torch.int64)
    return Examples(list(features), n.bool(), n, n)


def test_it_is_the_sum_of_the_rows_digests():
    ids = torch.tensor([[1, 2, 3], [2**40, -1, 0]])
    lines = [b"".join(v.to_bytes(8, "little", signed=True) for v in row) for row in ids.tolist()]
    expected = sum(
        int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little") for line in lines
    )
    assert step_digest([rows(ids)]) % 2**64 == expected % 2**64 == digest_rows(ids.numpy())
    assert -(2**63) <= step_digest([rows(ids)]) == batch_digest([ids]) < 2**63


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_every_cut_gives_the_same_number(parts):
    """Also as views of longer rows, in another order, and summed as int64, which wraps."""
    ids = torch.randint(0, 50_000, (64, 33), generator=torch.Generator().manual_seed(0))
    ranks = [[rows(c[:, :-1]) for c in part.chunk(2)] for part in ids.flip(0).chunk(parts)]
    summed = torch.tensor([step_digest(rank) for rank in ranks]).sum().item()
    assert summed == step_digest([rows(ids[:, :-1])])


def test_the_last_label_counts():
    ids = torch.zeros((4, 8), dtype=torch.int64)
    other = ids.clone()
    other[3, 7] = 1  # the label of the last input, no input of this row
    assert step_digest([rows(ids)]) != step_digest([rows(other)])
    assert step_digest([]) == 0


def test_labels_of_examples_count_and_their_numbers_do_not():
    one = {"input_ids": [5, 6], "labels": 1, "example": 7}
    assert step_digest([examples(one)]) == step_digest([examples({**one, "example": 8})])
    for other in ({"labels": 0}, {"labels": [1.0, 0.0]}, {"positive": [3]}, {"input_ids": [5]}):
        assert step_digest([examples(one)]) != step_digest([examples({**one, **other})])
