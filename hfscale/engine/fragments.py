"""Where each rank's share of the model and optimizer lives, the same view at every ZeRO stage.

A fragment is a range of a flattened parameter with its fp32 weight and what the optimizer keeps
beside it: live, flat views, so copying from them saves and copying into them loads. DeepSpeed's own
checkpoints tie a run to its stage and world size; ranges of named parameters tie it to nothing.

Legend: W ranks; a parameter has ``numel`` elements, flattened row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfscale.dist.world import Place

# the fp32 weight and what is kept beside it, of what the optimizer holds as one tensor
Kept = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Fragment:
    """Elements ``start .. start + numel`` of the flattened tensor ``name``."""

    name: str  # as in ``model.named_parameters()`` or ``named_buffers()``
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    # "weight", and if trained what the optimizer keeps, by its names; 1-D, equally long, live
    tensors: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return self.tensors["weight"].numel()


def partitioned(
    module: nn.Module, zero: Any, *, stage: int, kept: Kept, rank: int
) -> Iterator[Fragment]:
    """Yield what ZeRO gave to this rank. Fragments of different ranks never overlap."""
    param: Any  # DeepSpeed hangs its own attributes on it
    for name, param in module.named_parameters():
        if stage == 3:
            for part in _split(name, param, rank=rank):
                if param.requires_grad:
                    group, offset, _ = zero.grad_position[zero.get_param_id(param)]
                    flat = zero.fp32_partitioned_groups_flat[group]
                    part.tensors.update(
                        {
                            key: value.narrow(0, offset, part.numel)
                            for key, value in kept(flat).items()
                        }
                    )
                yield part
        elif param.requires_grad and param._hp_mapping is not None:  # None: it lies on other ranks
            mapping = param._hp_mapping
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            here = mapping.get_hp_fragment_address()
            tensors = {
                key: value.narrow(0, here.start, here.numel) for key, value in kept(flat).items()
            }
            yield Fragment(name, tuple(param.shape), mapping.lp_fragment_address.start, tensors)


def replicated(module: nn.Module, *, stage: int, kept: Kept) -> Iterator[Fragment]:
    """Yield, whole, what every rank holds: persistent buffers, below stage 3 frozen parameters, at
    stage 0 all parameters.
    """
    for name, param in module.named_parameters():
        if stage == 0 and param.requires_grad:
            yield Fragment(
                name,
                tuple(param.shape),
                0,
                {key: value.view(-1) for key, value in kept(param).items()},
            )
        elif stage < 3 and not param.requires_grad:
            yield Fragment(name, tuple(param.shape), 0, {"weight": param.detach().view(-1)})
    yield from _buffers(module)


def held(module: nn.Module, *, rank: int) -> Iterator[Fragment]:
    """Yield what this rank holds of a model that is not trained: persistent buffers, and of each
    parameter its share or all.
    """
    for name, param in module.named_parameters():
        if hasattr(param, "ds_tensor"):
            yield from _split(name, param, rank=rank)
        else:
            yield Fragment(name, tuple(param.shape), 0, {"weight": param.detach().view(-1)})
    yield from _buffers(module)


def _split(name: str, param: Any, *, rank: int) -> Iterator[Fragment]:
    """Yield the share of a parameter that stage 3 gave to this rank, if it is more than padding."""
    size = param.ds_tensor.numel()
    real = min(size, param.ds_numel - rank * size)
    if real > 0:
        yield Fragment(
            name,
            tuple(param.ds_shape),
            rank * size,
            {"weight": param.ds_tensor.detach().narrow(0, 0, real)},
        )


def _buffers(module: nn.Module) -> Iterator[Fragment]:
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield Fragment(
                    f"{path}.{name}" if path else name,
                    tuple(buffer.shape),
                    0,
                    {"weight": buffer.detach().view(-1)},
                )


def share(fragments: Iterable[Fragment], *, place: Place) -> Iterator[Fragment]:
    """Yield this rank's part of ``fragments`` laid end to end and cut into W nearly equal
    ranges.
    """
    whole = list(fragments)
    total = sum(fragment.numel for fragment in whole)
    first, last = place.rank * total // place.size, (place.rank + 1) * total // place.size
    position = 0
    for fragment in whole:
        start, stop = max(first - position, 0), min(last - position, fragment.numel)
        if start < stop:
            part = {
                key: value.narrow(0, start, stop - start) for key, value in fragment.tensors.items()
            }
            yield Fragment(fragment.name, fragment.shape, fragment.start + start, part)
        position += fragment.numel


def tied(module: nn.Module) -> dict[str, str]:
    """Return ``{other name: name it is saved under}`` for parameters that are one and the same."""
    first: dict[Tensor, str] = {}
    homes = {
        name: first.setdefault(param, name)
        for name, param in module.named_parameters(remove_duplicate=False)
    }
    return {name: home for name, home in homes.items() if home != name}


def flats(
    zero: Any, optimizer: torch.optim.Optimizer, *, stage: int
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield what the optimizer holds as one tensor (fp32), with its group; the same number of them
    on every rank, in the same order.
    """
    if stage == 0:
        for group in optimizer.param_groups:
            yield from ((param, group) for param in group["params"])
    elif stage == 3:
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            yield flat, optimizer.param_groups[zero.sub_group_to_group_id[number]]
    else:
        yield from zip(zero.single_partition_of_fp32_groups, optimizer.param_groups, strict=True)
