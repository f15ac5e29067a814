"""Whether the losses of tokens are made in chunks, without the logits of a micro-batch: chosen by
their size, and proven against the logits before the run's first step.

The proof is of one short row through the live model. Its losses must be those of the model's own
logits, and the gradients that are made beside them those of plain autograd through the head's
weight. A model for which that is not so keeps its logits, and the log says why.

Shape legend: B rows, T tokens, N = B * T, H width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfscale.config.schema import TrainConfig
from hfscale.dist.agree import sum_over_ranks
from hfscale.engine.engine import Engine
from hfscale.engine.start import gathered
from hfscale.errors import ConfigError
from hfscale.log import logger
from hfscale.models.call import call
from hfscale.models.head import After, UnknownHead, head_of, listen
from hfscale.objectives.base import Objective
from hfscale.objectives.chunked_head import LARGE, ChunkedHead, Question, chunked, wants_chunks
from hfscale.objectives.cross_entropy import IGNORE_INDEX, token_losses

SMOOTHING = 0.1  # of the labels in the proof of the gradient: it is a part of it
# how far losses may be apart, of the largest logit: a few roundings of it; and gradients, of their
# norm
LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 2**-7}
GRADIENT_BOUNDS = {"fp32": 1e-4, "bf16": 2e-2}


def choose_head(objective: Objective, engine: Engine, config: TrainConfig) -> None:
    """Return with ``objective.head`` chosen, and the choice in the log. Collective, in eval mode.

    Raises:
        ConfigError: on every rank, if ``engine.head: chunked`` cannot be done.
    """
    asked, tokens = config.engine.head, config.train.micro_batch * config.data.seq_len
    if asked == "plain":
        return
    try:
        if not objective.token_loss:
            raise UnknownHead("this objective asks for no tokens")
        linear = head_of(engine)
        if not wants_chunks(config.engine, tokens=tokens, head=linear):
            return
        head, off = prove_head(objective, engine)
    except UnknownHead as error:
        if asked == "chunked":
            raise ConfigError(
                f"the head cannot be asked in chunks: {error}",
                where="engine.head",
                value=asked,
                remedy="set engine.head=auto, which then keeps the logits whole",
            ) from error
        vocab_size = getattr(engine.module.config.get_text_config(), "vocab_size", None) or 0
        if objective.token_loss and tokens * vocab_size >= LARGE:
            logger.warning(f"the logits of a micro-batch are kept whole: {error}")
        return
    gib = tokens * linear.out_features * 4 / 2**30
    objective.head = head
    logger.info(
        f"the head is asked in chunks: no {gib:.1f} GiB of logits (fp32); losses and gradients "
        f"are those of the whole head, off by {off:.1e}; after it: {head.after.names}"
    )


def prove_head(objective: Objective, engine: Engine) -> tuple[ChunkedHead, float]:
    """Return the chunked head of the model in ``engine``, and how far it is from the plain one: of
    losses relative to the largest logit, of gradients to their norm. Collective, in eval mode.

    Raises:
        UnknownHead: on every rank, if it cannot be asked so, or does not give the same.
    """
    inputs = objective.probe_inputs(engine.module.config)
    if inputs is None:
        raise UnknownHead("nothing is known that it could be tried with")
    inputs = {name: one.to(engine.device) for name, one in inputs.items()}
    ids_BT = inputs.get("decoder_input_ids", inputs["input_ids"])
    labels_BT = ids_BT.flip(1)
    labels_BT[:, 0] = IGNORE_INDEX

    def forward() -> Tensor:
        logits: Tensor = call(engine, **inputs).logits
        return logits

    after, hidden, logits_BTV = listen(engine, forward)
    head = ChunkedHead(after)
    losses_BT = head.scores(engine, labels_BT, forward).losses_BT
    plain_BT = token_losses(logits_BTV, labels_BT)
    losses_off = float((losses_BT - plain_BT).abs().max() / logits_BTV.abs().max().clamp(min=1.0))
    linear = head_of(engine)
    with gathered(linear.parameters()):
        hidden_NH = hidden.reshape(-1, hidden.shape[-1])
        gradient_off = _gradient_off(linear, hidden_NH, labels_BT.reshape(-1), after)
    precision = engine.precision
    if not _all_ranks(losses_off <= LOSS_BOUNDS[precision]):
        raise UnknownHead(f"losses would be off by {losses_off:.1e} of the largest logit")
    if not _all_ranks(gradient_off <= GRADIENT_BOUNDS[precision]):
        raise UnknownHead(f"gradients would be off by {gradient_off:.1e} of their norm")
    return head, max(losses_off, gradient_off)


def _all_ranks(fine: bool) -> bool:
    return not int(sum_over_ranks(torch.tensor(not fine, dtype=torch.int64)))


def _gradient_off(linear: nn.Linear, hidden_NH: Tensor, labels_N: Tensor, after: After) -> float:
    """Return how far gradients through the head are from autograd's, of their norm, at most."""
    question = Question(after, SMOOTHING)

    def ours(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        return chunked(hidden_NH, weight_VH, bias_V, labels_N, question)[0].sum()

    def plain(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        logits_NV = after(F.linear(hidden_NH, weight_VH, bias_V)).float()
        return F.cross_entropy(
            logits_NV,
            labels_N,
            ignore_index=IGNORE_INDEX,
            label_smoothing=SMOOTHING,
            reduction="sum",
        )

    seen, right = (_gradients(way, linear, hidden_NH) for way in (ours, plain))
    offs = [_norm(one - other) / _norm(other) for one, other in zip(seen, right, strict=True)]
    return max(offs) if all(map(math.isfinite, offs)) else math.inf


def _norm(tensor: Tensor) -> float:
    """Return the norm in fp32, without a copy; never quite 0."""
    return max(1e-30, float(torch.linalg.vector_norm(tensor, dtype=torch.float32)))


def _gradients(way: Callable[..., Tensor], linear: nn.Linear, hidden_NH: Tensor) -> list[Tensor]:
    """Return the gradients of hidden states, weight and bias."""
    with torch.enable_grad():
        given = [hidden_NH, linear.weight, linear.bias]
        leaves = [one if one is None else one.detach().requires_grad_() for one in given]
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [*torch.autograd.grad(way(*leaves), wanted)]
