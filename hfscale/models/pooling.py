"""One vector for a text, out of its tokens' hidden states.

Shape legend: B texts, T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Pooling = Literal["cls", "mean", "last"]


def pool(hidden_BTH: Tensor, mask_BT: Tensor, how: Pooling) -> Tensor:
    """Return ``pooled_BH`` (fp32): the first token's state, the mean of all, or the last one's;
    ``mask_BT`` is 0 at padding (right).
    """
    if how == "cls":
        return hidden_BTH[:, 0].float()
    if how == "last":
        last_B = mask_BT.sum(1).long() - 1
        return hidden_BTH[range(len(hidden_BTH)), last_B].float()
    mask_BT1 = mask_BT.unsqueeze(-1).float()
    return (hidden_BTH.float() * mask_BT1).sum(1) / mask_BT1.sum(1)
