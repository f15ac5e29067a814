"""Token cross-entropy from logits as sums, in fp32, without a second fp32 copy of the logits.

Shape legend: B sequences, T tokens, V vocabulary, N = B * T. Logits may be fp32, bf16 or fp16.
Autograd's own path keeps the logits three times in fp32; here they are kept once, as the model made
them, and one chunk of fp32 numbers is in flight at a time. On a CPU, where a chunk stays in the
cache, it is also 1.5 to 3 times faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # labels that ask nothing; same value as transformers
# numbers in flight
CPU_CHUNK = 1 << 20  # 4 MiB of cache
GPU_CHUNK = 1 << 26  # few kernel launches, and 256 MiB
# what the meta device stands for, where a plan is made of what another one would hold
META_IS: ContextVar[str] = ContextVar("META_IS", default="cuda")


def token_losses(logits_BTV: Tensor, labels_BT: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Return ``losses_BT`` = -log softmax(logits)[label] in nats, fp32; 0 where the label is
    IGNORE_INDEX.

    With ``smoothing`` e the label has 1 - e + e / V of the target, every other id e / V (Szegedy et
    al. 2016, sec. 7).
    """
    losses_N: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits_BTV.reshape(-1, logits_BTV.shape[-1]), labels_BT.reshape(-1), smoothing
    )
    return losses_N.view(labels_BT.shape)


class _Kept(Protocol):
    """What torch keeps of a forward pass for its backward."""

    saved_tensors: tuple[Tensor, ...]
    smoothing: float

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _CrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax(logits) - target, computed again in backward."""

    @staticmethod
    def forward(ctx: _Kept, logits_NV: Tensor, labels_N: Tensor, smoothing: float) -> Tensor:
        ctx.save_for_backward(logits_NV, labels_N)
        ctx.smoothing = smoothing
        losses = partial(
            F.cross_entropy,
            reduction="none",
            ignore_index=IGNORE_INDEX,
            label_smoothing=smoothing,
        )
        return torch.cat(
            [
                losses(part.float(), labels)
                for part, labels in _chunks(logits_NV, logits_NV, labels_N)
            ]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, grad_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, labels_N = ctx.saved_tensors
        asked_N = labels_N != IGNORE_INDEX
        targets_N1 = labels_N.where(asked_N, 0).unsqueeze(1)
        grad_N1 = grad_N.where(asked_N, 0.0).unsqueeze(1)
        grad_NV = torch.empty_like(logits_NV)
        for part, target, grad, out in _chunks(logits_NV, logits_NV, targets_N1, grad_N1, grad_NV):
            probability = part.softmax(1, dtype=torch.float32)
            difference = probability.scatter_add_(
                1, target, torch.full_like(grad, ctx.smoothing - 1.0)
            )
            out.copy_(difference.sub_(ctx.smoothing / probability.shape[1]).mul_(grad))
        return grad_NV, None, None


def _chunks(logits_NV: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return an iterator over ``tensors``, cut alike along N."""
    rows = max(1, in_flight(logits_NV) // logits_NV.shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def in_flight(tensor: Tensor) -> int:
    """Return how many numbers are worked on at a time where ``tensor`` is."""
    kind = META_IS.get() if tensor.is_meta else tensor.device.type
    return CPU_CHUNK if kind == "cpu" else GPU_CHUNK
