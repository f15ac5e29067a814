"""The losses of tokens straight from hidden states: head and cross-entropy in one, a chunk of
tokens at a time, so that the logits of a micro-batch are never there together.

Shape legend: N tokens, n of them asked, H width, V vocabulary, R tokens of a chunk.

The gradient of the losses' sum is made in the forward pass, where a chunk's logits are at hand:

    logits_RV = after(hidden_RH @ weight_VH.T + bias_V)
    losses_R  = -log softmax(logits)[label]
    slope_RV  = softmax(logits) - target, through ``after``
    hidden's gradient  = slope_RV @ weight_VH
    weight's gradient += slope_RV.T @ hidden_RH                   (fp32)

Backward multiplies it by what the loss of a token is multiplied by, so nothing is computed twice,
and at ZeRO 3 the weight is gathered no more often than for the logits. For the weight that must be
one number for all tokens of the micro-batch; hidden states may have one each. Tokens that ask
nothing (most, in masked language modelling) are left out.

Source: Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models (arXiv 2411.09009);
the gradient in the forward pass as in Hsu et al. 2024, Liger Kernel (arXiv 2410.10989), sec. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hfscale.config.schema import Engine
from hfscale.errors import ConfigError
from hfscale.models.call import Model
from hfscale.models.head import After, answering, head_of
from hfscale.objectives.cross_entropy import IGNORE_INDEX, in_flight

CHUNK_BYTES = 1 << 27  # of the logits of a chunk
LARGE = 2**28  # logits of a micro-batch: 1 GiB in fp32, and once more for their gradient


def wants_chunks(engine: Engine, *, tokens: int, head: nn.Linear) -> bool:
    """Return whether the losses of a micro-batch of ``tokens`` shall be made in chunks.

    By itself that is so where the logits are large, and larger than what there is in their place:
    the gradient of a head that is trained, in fp32. Not in fp16, whose loss scale would come too
    late: in the forward pass the gradient is too small for it.
    """
    if engine.head == "auto":
        room = tokens >= 2 * head.in_features or not head.weight.requires_grad
        able = not engine.compile and engine.precision != "fp16"
        return tokens * head.out_features >= LARGE and room and able
    return engine.head == "chunked"


def chunk_tokens(weight_VH: Tensor) -> int:
    """Return how many tokens have their logits at the same time."""
    return max(1, CHUNK_BYTES // (len(weight_VH) * weight_VH.element_size()))


@dataclass(frozen=True)
class Scores:
    """What a model makes of labels."""

    losses_BT: Tensor  # nats, fp32; 0 where nothing is asked
    # whether the likeliest id is the label, where that was wanted; False where nothing is asked
    right_BT: Tensor | None = None


@dataclass(frozen=True)
class Question:
    """What is asked of the tokens' logits."""

    after: After
    smoothing: float = 0.0  # of labels
    guesses: bool = False  # whether the likeliest ids are right
    trained: bool = True  # the gradient is wanted too


@dataclass(frozen=True)
class ChunkedHead:
    """The head of models that do ``after`` to their logits, asked in chunks."""

    after: After

    def scores(
        self,
        model: Model,
        labels_BT: Tensor,
        forward: Callable[[], Tensor],
        *,
        smoothing: float = 0.0,
        guesses: bool = False,
    ) -> Scores:
        """Return what ``forward``, a pass through ``model``, makes of labels.

        In it the head answers with one number that means nothing. It is kept in the graph, so that
        ZeRO sees a module whose output has a gradient, and has the weight at hand when that comes.
        """
        question = Question(self.after, smoothing, guesses, trained=torch.is_grad_enabled())
        head, answers = head_of(model), list[tuple[Tensor, Tensor]]()

        def answer(hidden: Tensor) -> Tensor:
            hidden_NH, labels_N = hidden.reshape(-1, hidden.shape[-1]), labels_BT.reshape(-1)
            assert len(hidden_NH) == len(labels_N), "a hidden state for each label"
            losses_N, right_N, nothing = chunked(
                hidden_NH, head.weight, head.bias, labels_N, question
            )
            answers.append((losses_N, right_N))
            return nothing

        with answering(head, answer):
            nothing = forward()
        ((losses_N, right_N),) = answers
        never = torch.zeros((), dtype=torch.bool, device=losses_N.device)
        losses_N = torch.where(never, nothing.sum().float(), losses_N)
        right_BT = right_N.view(labels_BT.shape) if guesses else None
        return Scores(losses_N.view(labels_BT.shape), right_BT)


def chunked(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor, what: Question
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``losses_N`` (nats, fp32), ``right_N`` (bool) and a zero (1, 1, 1) that depends on
    both.

    Backward raises a ConfigError if losses of one micro-batch are weighed unlike.
    """
    out: tuple[Tensor, Tensor, Tensor] = _Chunked.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias_V, labels_N, what
    )
    return out


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        what: Question,
    ) -> tuple[Tensor, Tensor, Tensor]:
        asked_n = _asked(labels_N)
        hidden_nH, labels_n = hidden_NH, labels_N
        if asked_n is not None:
            hidden_nH, labels_n = hidden_NH[asked_n], labels_N[asked_n]
        wanted = [what.trained and one for one in ctx.needs_input_grad]
        gradients = _Gradients.of(hidden_nH, weight_VH, bias_V, wanted=wanted)
        losses_n, right_n = _pass(hidden_nH, weight_VH, bias_V, labels_n, what, gradients)
        ctx.save_for_backward(
            gradients.hidden_nH, gradients.weight_VH, gradients.bias_V, asked_n, hidden_NH[:0]
        )
        ctx.tokens, ctx.dtype = len(labels_N), weight_VH.dtype
        if asked_n is not None:
            losses_n = losses_n.new_zeros(len(labels_N)).index_copy_(0, asked_n, losses_n)
            right_n = right_n.new_zeros(len(labels_N)).index_copy_(0, asked_n, right_n)
        ctx.mark_non_differentiable(right_n)
        return losses_n, right_n, hidden_NH.new_zeros(1, 1, 1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_N: Tensor, _right: Tensor, _nothing: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden_nH, weight_VH, bias_V, asked_n, none_0H = ctx.saved_tensors
        grad_n = grad_N if asked_n is None else grad_N[asked_n]
        grad_NH = None
        if hidden_nH is not None:
            grad_NH = (hidden_nH.float() * grad_n[:, None]).to(hidden_nH.dtype)
        if hidden_nH is not None and asked_n is not None:
            whole_NH = none_0H.new_zeros(ctx.tokens, none_0H.shape[1])
            grad_NH = whole_NH.index_copy_(0, asked_n, grad_NH)
        if weight_VH is None and bias_V is None:
            return grad_NH, None, None, None, None
        factor = _one_factor(grad_n)
        if weight_VH is not None:
            weight_VH = weight_VH.mul_(factor).to(ctx.dtype)
        if bias_V is not None:
            bias_V = bias_V.mul_(factor).to(ctx.dtype)
        return grad_NH, weight_VH, bias_V, None, None


@dataclass
class _Gradients:
    """Of the sum of losses, as far as it went; None: not wanted."""

    hidden_nH: Tensor | None
    weight_VH: Tensor | None  # fp32
    bias_V: Tensor | None  # fp32

    @classmethod
    def of(
        cls,
        hidden_nH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        *,
        wanted: Sequence[bool],
    ) -> _Gradients:
        """Return those that are ``wanted`` of the three."""

        def sums(like: Tensor | None, wanted: bool) -> Tensor | None:
            if like is None or not wanted:
                return None
            return torch.zeros_like(like, dtype=torch.float32)

        own_nH = torch.empty_like(hidden_nH) if wanted[0] else None
        return cls(own_nH, sums(weight_VH, wanted[1]), sums(bias_V, wanted[2]))

    @property
    def wanted(self) -> bool:
        """Whether any of them is."""
        return any(one is not None for one in (self.hidden_nH, self.weight_VH, self.bias_V))

    def add(self, slope_RV: Tensor, *, rows: slice, hidden_RH: Tensor, weight_VH: Tensor) -> None:
        """Add those of a chunk."""
        if self.hidden_nH is not None:
            torch.mm(slope_RV, weight_VH, out=self.hidden_nH[rows])
        if self.weight_VH is not None and slope_RV.dtype == torch.float32:
            self.weight_VH.addmm_(slope_RV.T, hidden_RH)
        elif self.weight_VH is not None:  # a part of the ids at a time: the product is in 16 bit
            some = max(1, in_flight(slope_RV) // hidden_RH.shape[1])
            parts = zip(self.weight_VH.split(some), slope_RV.split(some, dim=1), strict=True)
            for part_vH, slope_Rv in parts:
                part_vH.add_(slope_Rv.T @ hidden_RH)
        if self.bias_V is not None:
            self.bias_V.add_(slope_RV.sum(0, dtype=torch.float32))


def _pass(
    hidden_nH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_n: Tensor,
    what: Question,
    gradients: _Gradients,
) -> tuple[Tensor, Tensor]:
    """Return ``losses_n`` and ``right_n``, with the gradients put into ``gradients``."""
    n, V = len(labels_n), len(weight_VH)
    rows_R = chunk_tokens(weight_VH)
    rows_cached = max(1, in_flight(hidden_nH) // V)
    losses_n = hidden_nH.new_empty(n, dtype=torch.float32)
    right_n = hidden_nH.new_zeros(n, dtype=torch.bool)
    logits_RV = hidden_nH.new_empty(min(rows_R, n), V)  # each chunk is written over the one before
    for begin in range(0, n, rows_R):
        rows = slice(begin, min(begin + rows_R, n))
        hidden_RH = hidden_nH[rows]
        part_RV = logits_RV[: len(hidden_RH)]
        if bias_V is None:
            torch.mm(hidden_RH, weight_VH.T, out=part_RV)
        else:
            torch.addmm(bias_V, hidden_RH, weight_VH.T, out=part_RV)
        cut = (one.split(rows_cached) for one in (part_RV, labels_n[rows], losses_n[rows]))
        guessed = right_n[rows].split(rows_cached)
        for few_rV, labels_r, losses_r, right_r in zip(*cut, guessed, strict=True):
            _few(few_rV, labels_r, losses_r, right_r, what, sloped=gradients.wanted)
        if gradients.wanted:
            gradients.add(part_RV, rows=rows, hidden_RH=hidden_RH, weight_VH=weight_VH)
    return losses_n, right_n


def _few(
    logits_rV: Tensor,
    labels_r: Tensor,
    losses_r: Tensor,
    right_r: Tensor,
    what: Question,
    *,
    sloped: bool,
) -> None:
    """Fill in the losses of r tokens, whether they were guessed, and in place of their logits the
    slope of their losses where that is wanted.
    """
    traced = sloped and bool(what.after.steps)
    with torch.set_grad_enabled(traced):
        leaf_rV = logits_rV.detach().requires_grad_(traced)
        answer_rV = what.after(leaf_rV)
    final_rV = answer_rV.detach()
    target_r1 = labels_r[:, None]
    if what.guesses:
        right_r.copy_(final_rV.argmax(1) == labels_r)
    log_rV = final_rV.log_softmax(1, dtype=torch.float32)
    e = what.smoothing
    nats_r = log_rV.gather(1, target_r1).squeeze(1).neg()
    if e:
        nats_r = (1 - e) * nats_r - e * log_rV.mean(1)
    losses_r.copy_(nats_r)
    if not sloped:
        return
    slope_rV = log_rV.exp_()
    slope_rV.scatter_add_(1, target_r1, slope_rV.new_full(target_r1.shape, e - 1.0))
    if e:
        slope_rV.sub_(e / slope_rV.shape[1])
    if traced:
        (slope_rV,) = torch.autograd.grad(answer_rV, leaf_rV, slope_rV.to(answer_rV.dtype))
    logits_rV.copy_(slope_rV)


def _asked(labels_N: Tensor) -> Tensor | None:
    """Return which tokens are asked; None: all of them, as far as is known."""
    if labels_N.is_meta:
        return None
    asked_n = (labels_N != IGNORE_INDEX).nonzero().squeeze(1)
    return asked_n if len(asked_n) < len(labels_N) else None


def _one_factor(grad_n: Tensor) -> Tensor:
    """Return what the losses of all tokens are multiplied by.

    Raises:
        ConfigError: if they are weighed unlike.
    """
    if grad_n.is_meta:
        return grad_n.new_ones(())
    if not len(grad_n):
        return grad_n.new_ones(())
    if not torch.equal(grad_n, grad_n[:1].expand_as(grad_n)) and not grad_n.isnan().any():
        raise ConfigError(
            "this objective weighs the tokens of a micro-batch unlike",
            where="engine.head=chunked",
            value=f"from {float(grad_n.min()):.4g} to {float(grad_n.max()):.4g}",
            remedy="set engine.head=plain",
        )
    return grad_n[0]
