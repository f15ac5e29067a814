"""The gradient that the optimizer is about to use: its norm, and parameter by parameter the same
view at every ZeRO stage, of what the ranks have added up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from hfscale.engine.fragments import Fragment

BLOCK = 1024  # elements that are added up in the gradient's own precision
# is shown a fragment of this rank, its gradient (1-D, as long), and by what that was divided
Reader = Callable[[Fragment, Tensor, float], None]


def show(
    fragments: Iterable[Fragment],
    optimizer: torch.optim.Optimizer,
    read: Reader,
    *,
    names: Collection[str],
    clipped_by: float,
) -> None:
    """Show the gradients of the parameters ``names`` in what ``optimizer`` holds at this moment."""
    flats = [
        param
        for group in optimizer.param_groups
        for param in group["params"]
        if param.grad is not None
    ]
    for fragment in fragments:
        if fragment.name not in names:
            continue
        weight = fragment.tensors["weight"]
        storage = weight.untyped_storage().data_ptr()
        for flat in flats:
            begin = int(weight.storage_offset()) - int(flat.storage_offset())
            if flat.untyped_storage().data_ptr() == storage and 0 <= begin < flat.numel():
                gradient = flat.grad.view(-1).narrow(0, begin, fragment.numel)
                read(fragment, gradient, clipped_by)


def norm(gradients: list[Tensor]) -> Tensor:
    """Return the L2 norm of all of them. A CPU adds a tensor up in fp32 one by one (0.5 % off at 66
    M elements), so in blocks here.
    """
    norms = []
    for gradient in (whole.flatten() for whole in gradients):
        in_blocks = gradient.numel() // BLOCK * BLOCK
        norms.append(torch.linalg.vector_norm(gradient[:in_blocks].view(-1, BLOCK), dim=1))
        norms.append(torch.linalg.vector_norm(gradient[in_blocks:], keepdim=True))
    return torch.cat(norms).double().square().sum().sqrt().float()
