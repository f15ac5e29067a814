"""Token cross-entropy from logits as sums, in fp32, without a second fp32 copy of the logits.

Shape legend: B sequences, T tokens, V vocabulary, N = B * T. Logits may be fp32, bf16 or fp16.
Autograd's own path keeps the logits three times in fp32; here they are kept once, as the model made them, and one chunk
of ``CHUNK`` fp32 numbers is in flight at a time.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # labels that ask nothing; same value as transformers
CHUNK = 1 << 24  # numbers of fp32 in flight: 64 MiB


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return ``losses_BT`` = -log softmax(logits)[label] in nats, fp32; 0 where the label is IGNORE_INDEX."""
    losses_N: Tensor = _CrossEntropy.apply(logits_BTV.reshape(-1, logits_BTV.shape[-1]), labels_BT.reshape(-1))
    return losses_N.view(labels_BT.shape)


class _CrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax(logits) - onehot(label), computed again in backward from the log of the sum."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        asked_N = labels_N != IGNORE_INDEX
        targets_N1 = labels_N.where(asked_N, 0).unsqueeze(1)
        log_sum_N = torch.cat([part.float().logsumexp(1) for part in _chunks(logits_NV)])
        ctx.save_for_backward(logits_NV, targets_N1, asked_N, log_sum_N)
        return (log_sum_N - logits_NV.gather(1, targets_N1).squeeze(1).float()).where(asked_N, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N1, asked_N, log_sum_N = ctx.saved_tensors
        grad_N1 = grad_N.where(asked_N, 0.0).unsqueeze(1)
        grad_NV = torch.empty_like(logits_NV)
        columns = (_chunks(t) for t in (logits_NV, grad_NV))
        rows = (t.split(_rows(logits_NV)) for t in (targets_N1, grad_N1, log_sum_N.unsqueeze(1)))
        for part, out, target, grad, log_sum in zip(*columns, *rows, strict=True):
            probability = (part.float() - log_sum).exp_()
            out.copy_(probability.scatter_add_(1, target, torch.full_like(grad, -1.0)).mul_(grad))
        return grad_NV, None


def _rows(logits_NV: Tensor) -> int:
    return max(1, CHUNK // logits_NV.shape[1])


def _chunks(logits_NV: Tensor) -> tuple[Tensor, ...]:
    return logits_NV.split(_rows(logits_NV))
