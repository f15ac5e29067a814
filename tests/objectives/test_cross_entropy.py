"""Our cross-entropy against torch's: values, gradients, precisions, chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hfscale.objectives import cross_entropy
from hfscale.objectives.cross_entropy import IGNORE_INDEX, token_losses


def reference(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    flat = logits_BTV.float().flatten(0, 1), labels_BT.flatten()
    return F.cross_entropy(*flat, reduction="none", label_smoothing=smoothing).view(labels_BT.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 130, cross_entropy.CPU_CHUNK])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_values_and_gradients_equal_those_of_torch(
    dtype: torch.dtype, chunk: int, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", chunk)
    torch.manual_seed(0)
    logits_BTV = (torch.randn(3, 5, 41) * 4).to(dtype).requires_grad_()
    labels_BT = torch.randint(41, (3, 5))
    labels_BT[0, 2:] = IGNORE_INDEX
    weights_B = torch.tensor([0.5, 2.0, 1.0])
    ours, theirs = (
        token_losses(logits_BTV, labels_BT, smoothing=smoothing),
        reference(logits_BTV, labels_BT, smoothing),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    assert ours.dtype == torch.float32
    (grad_ours,) = torch.autograd.grad((ours.sum(1) * weights_B).sum(), logits_BTV)
    (grad_theirs,) = torch.autograd.grad((theirs.sum(1) * weights_B).sum(), logits_BTV)
    assert grad_ours.dtype == dtype
    torch.testing.assert_close(grad_ours, grad_theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert (grad_ours[0, 2:] == 0).all()


def test_rows_that_ask_nothing_get_exactly_zero() -> None:
    logits_BTV = torch.randn(1, 2, 7, requires_grad=True)
    losses_BT = token_losses(logits_BTV, torch.full((1, 2), IGNORE_INDEX))
    losses_BT.sum().backward()
    assert (losses_BT == 0).all()
    assert logits_BTV.grad is not None
    assert (logits_BTV.grad == 0).all()


def test_logits_of_a_view_and_of_huge_size() -> None:
    logits_BTV = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]])[:, :1]
    assert token_losses(logits_BTV, torch.tensor([[0]])).item() == 0.0
    assert token_losses(logits_BTV, torch.tensor([[1]])).item() == pytest.approx(2e4)
