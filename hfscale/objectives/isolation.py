"""Keeping packed documents apart, and a probe that shows whether a live model does.

Shape legend: B rows, T tokens, V vocabulary. Documents are numbered within their row: ``document_ids_BT`` (int32) never falls.
Position ids that start again at each document isolate only in some architectures and kernels, so an additive block mask goes
with them; whether that is enough is not believed but probed, on the live model, kernel and dtype.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def keep_apart(model: Any, inputs: dict[str, Tensor], document_ids_BT: Tensor, *, config: PretrainedConfig) -> Tensor:
    """Return ``logits_BTV`` of a causal ``model`` in which every token sees its own document only."""
    positions_BT = document_positions(document_ids_BT)
    if config._attn_implementation == "flash_attention_2":  # knows packed documents in one flat row only
        flat = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
        logits = model(**flat, position_ids=positions_BT.reshape(1, -1), use_cache=False).logits
        return logits.view(*document_ids_BT.shape, -1)
    if has_sliding_window(config):  # a mask of ours would replace the window; transformers finds the documents by their positions
        return model(**inputs, position_ids=positions_BT, use_cache=False).logits
    dtype = getattr(model, "module", model).dtype  # an engine shows its model; the mask must have the precision it computes in
    mask_B1TT = document_mask(document_ids_BT, dtype=dtype)
    return model(**inputs, position_ids=positions_BT, attention_mask=mask_B1TT, use_cache=False).logits


def has_sliding_window(config: PretrainedConfig) -> bool:
    """Return whether some layer attends to a window shorter than the row may be."""
    return bool(getattr(config, "sliding_window", None)) and bool(getattr(config, "use_sliding_window", True))


def document_positions(document_ids_BT: Tensor) -> Tensor:
    """Return ``positions_BT`` (int64), counted from 0 in each document."""
    t_BT = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device).expand_as(document_ids_BT)
    starts_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return t_BT - t_BT.where(starts_BT, 0).cummax(1).values


def document_mask(document_ids_BT: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the additive ``mask_B1TT``: 0 where a token may look (back, in its own document), the lowest number elsewhere."""
    same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    mask_BTT = torch.zeros(same_BTT.shape, dtype=dtype, device=same_BTT.device).masked_fill_(~same_BTT.tril_(), torch.finfo(dtype).min)
    return mask_BTT.unsqueeze(1)


@torch.no_grad()
def movement(logits_of: Callable[[Tensor], Tensor], shape: tuple[int, int], vocab_size: int, *, changed: slice, watched: slice) -> float:
    """Return how far the logits at ``watched`` positions move when the ids at ``changed`` positions are changed; 0.0 = isolated.

    ``logits_of`` maps ids (B, T) on the CPU to logits_BTV of the live model in eval mode. Movement within the noise of
    repeating the same input counts as none. All ranks draw the same ids, so all return alike.
    """
    rng = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocab_size, shape, generator=rng)
    other_BT = ids_BT.clone()
    other_BT[:, changed] += torch.randint(1, vocab_size, other_BT[:, changed].shape, generator=rng)
    first, again, moved = (logits_of(ids)[0].float() for ids in (ids_BT, ids_BT, other_BT % vocab_size))
    if not (first - moved)[changed].abs().max() > 0:  # also when they are not numbers
        raise RuntimeError("the probe is blind: the logits do not depend on the ids")
    noise, distance = ((first - other)[watched].abs().max().item() for other in (again, moved))
    return distance if distance > 2 * noise else 0.0
