"""Positions, masks, and what the probe sees."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfscale.objectives.isolation import document_mask, document_positions, movement

DOCUMENTS_BT = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]], dtype=torch.int32)


def test_positions_start_again_in_each_document() -> None:
    assert document_positions(DOCUMENTS_BT).tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_opens_the_past_of_the_own_document(dtype: torch.dtype) -> None:
    mask_B1TT = document_mask(DOCUMENTS_BT, dtype=dtype)
    assert mask_B1TT.shape == (2, 1, 5, 5)
    assert mask_B1TT.dtype == dtype
    for row, documents in enumerate(DOCUMENTS_BT.tolist()):
        for q in range(5):
            for k in range(5):
                assert (mask_B1TT[row, 0, q, k] == 0) == (k <= q and documents[k] == documents[q])


def one_hot_sum(ids_BT: Tensor, *, seen: slice) -> Tensor:
    """Logits of a model that sees each token itself, and also the tokens of ``seen``."""
    logits_BTV = torch.nn.functional.one_hot(ids_BT, 50).float()
    return logits_BTV + 1e-3 * logits_BTV[:, seen].sum(1, keepdim=True)


def test_the_probe_measures_a_leak_and_nothing_else() -> None:
    def probe(seen: slice) -> float:
        return movement(lambda ids: one_hot_sum(ids, seen=seen), (2, 16), 50, changed=slice(0, 8), watched=slice(8, None))

    assert probe(slice(8, 16)) == 0.0
    assert probe(slice(7, 8)) == pytest.approx(1e-3, rel=1e-3)


def test_noise_is_no_leak_and_blindness_is_no_proof() -> None:
    noise = torch.Generator().manual_seed(0)

    def noisy(ids: Tensor) -> Tensor:
        return one_hot_sum(ids, seen=slice(8, 16)) + 1e-4 * torch.randn(2, 16, 50, generator=noise)

    assert movement(noisy, (2, 16), 50, changed=slice(0, 8), watched=slice(8, None)) == 0.0
    with pytest.raises(RuntimeError, match="blind"):
        movement(lambda ids: torch.zeros(2, 16, 50), (2, 16), 50, changed=slice(0, 8), watched=slice(8, None))
    with pytest.raises(RuntimeError, match="blind"):
        movement(lambda ids: torch.full((2, 16, 50), torch.nan), (2, 16), 50, changed=slice(0, 8), watched=slice(8, None))
