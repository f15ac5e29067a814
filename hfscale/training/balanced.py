"""The step of a mixture of experts whose routers are kept in balance (hfscale/models/router.py).

Shape legend: B rows, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hfscale.dist.agree import sum_over_ranks
from hfscale.objectives.base import ROUTER, Batch, Forward, Model, Objective
from hfscale.objectives.draws import random_state


def balanced(
    objective: Objective, model: Model, batches: Sequence[Batch], *, tokens: int
) -> Iterator[Forward]:
    """Yield each micro-batch with its sums, the routers' among them; ``tokens`` are those of the
    global step. Collective.

    How often each expert is chosen in the whole step must be known before the first backward. A
    step of one micro-batch a rank knows it after its forward; one of several goes through them
    once before, with the same random numbers.
    """
    states, chosen_E = [], torch.zeros(())
    if len(batches) > 1:
        with torch.no_grad():
            for batch in batches:
                states.append(random_state())
                chosen_E = chosen_E + _heard(objective, model, batch)[1]
        chosen_E = sum_over_ranks(chosen_E)
    for number, batch in enumerate(batches):
        if states:
            random_state(states[number])
        sums, own_E, probability_BE = _heard(objective, model, batch)
        if not states:
            chosen_E = sum_over_ranks(own_E)
        frequency_E = (chosen_E / max(1, tokens)).to(probability_BE)
        sums[ROUTER] = len(frequency_E) * (probability_BE @ frequency_E)
        yield Forward(batch, sums)


def _heard(
    objective: Objective, model: Model, batch: Batch
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return ``loss`` of a micro-batch, and of its routers ``chosen_E`` (on the CPU) and
    ``probability_BE``.
    """
    balancing = objective.balancing
    assert balancing is not None, "there are routers"
    with balancing.listening(model) as logits:
        sums = objective.loss(model, batch)
    chosen_E, probability_BE = balancing.parts(model, logits, routed(objective, batch))
    return sums, chosen_E.cpu().double(), probability_BE


def routed(objective: Objective, batch: Batch) -> Tensor:
    """Return ``weight_BT`` (0 or 1) of the tokens that count for the routers: no padding, and no
    row that asks nothing.
    """
    ids_BT, mask_BT = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
    weight_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    asked_B = batch.counts[objective.term] > 0
    return weight_BT * asked_B.to(weight_BT.device)[:, None]
