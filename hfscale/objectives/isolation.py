"""Keeping packed documents apart, and a probe that shows whether a live model does.

Shape legend: B rows, T tokens, V vocabulary. Documents are numbered within their row:
``document_ids_BT`` (int32) never falls. Position ids that start again at each document isolate only
in some architectures and kernels, so an additive block mask goes with them; whether that is enough
is not believed but probed, on the live model, kernel and dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfscale.errors import ConfigError
from hfscale.models.build import first_position
from hfscale.models.call import Model, call, live

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def keep_apart(
    model: Model,
    inputs: dict[str, Tensor],
    document_ids_BT: Tensor,
    *,
    config: PretrainedConfig,
    causal: bool = True,
) -> Tensor:
    """Return ``logits_BTV`` of ``model`` in which every token sees its own document only: what is
    before it (``causal``), or all of it.
    """
    positions_BT = document_positions(document_ids_BT) + first_position(config)
    # knows packed documents in one flat row only
    if config._attn_implementation == "flash_attention_2":
        flat = {name: tensor.reshape(1, -1) for name, tensor in inputs.items()}
        logits: Tensor = call(model, **flat, position_ids=positions_BT.reshape(1, -1)).logits
        # a chunked head leaves none
        return logits if logits.numel() == 1 else logits.view(*document_ids_BT.shape, -1)
    dtype = live(model).dtype  # masks must have the precision that it computes in
    masks = attention_masks(document_ids_BT, dtype=dtype, config=config, causal=causal)
    logits = call(model, **inputs, position_ids=positions_BT, attention_mask=masks).logits
    return logits


def attention_masks(
    document_ids_BT: Tensor, *, dtype: torch.dtype, config: PretrainedConfig, causal: bool
) -> Tensor | dict[str, Tensor]:
    """Return the additive ``mask_B1TT`` of all layers; where only some attend to a window, one for
    each kind of layer.
    """
    window = (
        getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True)
        else None
    )
    window = window if window and window < document_ids_BT.shape[1] else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if strange := {*kinds} - {"full_attention", "sliding_attention"}:
        raise ValueError(f"it has layers of {' and '.join(sorted(strange))}")
    windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}
    masks = {
        width: document_mask(document_ids_BT, dtype=dtype, causal=causal, window=width)
        for width in set(windows.values())
    }
    return (
        {kind: masks[width] for kind, width in windows.items()}
        if len(masks) > 1
        else masks.popitem()[1]
    )


def document_positions(document_ids_BT: Tensor) -> Tensor:
    """Return ``positions_BT`` (int64), counted from 0 in each document."""
    t_BT = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device).expand_as(
        document_ids_BT
    )
    starts_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return t_BT - t_BT.where(starts_BT, 0).cummax(1).values


def document_mask(
    document_ids_BT: Tensor, *, dtype: torch.dtype, causal: bool = True, window: int | None = None
) -> Tensor:
    """Return the additive ``mask_B1TT``: 0 where a token may look, the lowest number elsewhere.

    It may look at its own document, there only at itself and back if ``causal``, and no further
    than transformers' sliding ``window``.
    """
    seen_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    if causal:
        seen_BTT.tril_()
    if window is not None:
        seen_BTT.triu_(causal - window).tril_(window - causal)
    return torch.where(
        seen_BTT, seen_BTT.new_zeros((), dtype=dtype), torch.finfo(dtype).min
    ).unsqueeze(1)


def check_apart(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int],
    *,
    config: PretrainedConfig,
) -> None:
    """Refuse (ConfigError) a live model in which changing one document moves another's logits,
    given by ids and document ids (B, T).
    """
    first, second = slice(0, shape[1] // 2), slice(shape[1] // 2, None)
    documents_BT = torch.zeros(shape, dtype=torch.int32)
    documents_BT[:, second] = 1
    try:
        moved = max(
            movement(
                lambda ids_BT: logits_of(ids_BT, documents_BT),
                shape,
                config.vocab_size,
                changed=changed,
                watched=watched,
            )
            for changed, watched in ((first, second), (second, first))
        )
        leak = (
            f"documents leak: changing one moves the logits of another by {moved:.3g}"
            if moved
            else ""
        )
    except (
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # no position ids, or a mask of its own
        leak = f"this architecture cannot keep documents apart: {error}"
    if leak:
        raise ConfigError(
            leak,
            where="data.cross_document: false",
            value=f"{config.model_type} with attention {config._attn_implementation}",
            remedy="set data.cross_document=true, or choose an architecture that takes "
            "position ids and a mask"
            " (gpt2, llama, mistral, bert, modernbert with model.attention=sdpa)",
        )


@torch.no_grad()
def movement(
    logits_of: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    vocab_size: int,
    *,
    changed: slice,
    watched: slice,
) -> float:
    """Return how far the logits at ``watched`` positions move when the ids at ``changed`` positions
    are changed; 0.0 = isolated.

    ``logits_of`` maps ids (B, T) on the CPU to logits_BTV of the live model in eval mode. Movement
    within the noise of repeating the same input counts as none. All ranks draw the same ids, so all
    return alike.
    """
    rng = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocab_size, shape, generator=rng)
    other_BT = ids_BT.clone()
    other_BT[:, changed] += torch.randint(1, vocab_size, other_BT[:, changed].shape, generator=rng)
    first, again, moved = (
        logits_of(ids)[0].float() for ids in (ids_BT, ids_BT, other_BT % vocab_size)
    )
    if not (first - moved)[changed].abs().max() > 0:  # also when they are not numbers
        raise RuntimeError("the probe is blind: the logits do not depend on the ids")
    noise, distance = ((first - other)[watched].abs().max().item() for other in (again, moved))
    return distance if distance > 2 * noise else 0.0
