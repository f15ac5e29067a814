"""Does a model's answer depend on the padding beside its text? Asked of the live model, since no
list of architectures is complete.

A mask keeps padding out of attention, but FNet mixes all positions, ConvBERT's kernels reach over
the end of a text, and XLNet summarizes the last position, whatever stands there. Legend: T tokens
of a text, P of padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfscale.models.build import longest_row
from hfscale.models.call import Model, call, live

TEXT, PADDING = 12, 5  # tokens of the probe
# of the largest number of an output: what rounding explains where kernels get other shapes
SHORT, FULL = 5e-2, 1e-4
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


@torch.no_grad()
def reads_padding(model: Model, *, pad_id: int, device: torch.device | str) -> bool:
    """Return whether an answer of ``model`` (an engine, or bare; in eval mode) moves when its row
    is filled up.

    True also where the model does not take the probe: who reckons with padding is right either way.
    """
    config = live(model).config
    T = min(TEXT, (longest_row(config) or TEXT + PADDING) - PADDING)
    vocab_size, end = getattr(config, "vocab_size", 0), getattr(config, "eos_token_id", None)
    if T < 1 or vocab_size < 2:
        return True
    drawn = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(vocab_size - 1, (1, T), generator=drawn)
    ids_1T += ids_1T >= pad_id  # none of them is padding
    if isinstance(end, int) and end < vocab_size and end != pad_id:
        ids_1T[:, -1] = end  # BART and T5 classify by its state
    padded = torch.nn.functional.pad(ids_1T, (0, PADDING), value=pad_id)
    mask = torch.nn.functional.pad(torch.ones_like(ids_1T), (0, PADDING))
    try:
        alone = call(model, input_ids=ids_1T.to(device), attention_mask=mask[:, :T].to(device))
        filled = call(model, input_ids=padded.to(device), attention_mask=mask.to(device))
    except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return True
    pairs = [(getattr(alone, name, None), getattr(filled, name, None)) for name in OUTPUTS]
    return any(_differ(one, other) for one, other in pairs if one is not None and other is not None)


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        other = other[:, : one.shape[1]]
    allowed = FULL if one.dtype == torch.float32 else SHORT
    far = (one.float() - other.float()).abs().max()
    return not bool(far <= allowed * one.float().abs().max())  # also true of nan
