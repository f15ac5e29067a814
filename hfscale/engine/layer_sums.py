"""Sums of squares by layer, taken while the optimizer works: of the gradient, of the update, of the
weights. From them come the norms by layer of a picture, at every ZeRO stage alike.

The gradient is summed as a whole. Update and weights are summed over a sample of each fragment, so
no copy of the weights is needed. Nothing here changes a number that is trained.

Legend: G layers (or embeddings, or head); a flat is what the optimizer holds as one tensor: a
parameter at stage 0, a partition of many of them above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hfscale.engine.fragments import Fragment

# elements of a fragment: the norm of an update is then known to some 2 percent
SAMPLE = 4096


@dataclass(frozen=True)
class _Flat:
    """Where the fragments of one flat lie (all 1-D), and the sample of them."""

    begins: list[int]  # in the flat, one a fragment
    numels: list[int]
    layer: Tensor  # int64, of each fragment
    sample: Tensor  # int64: elements of the flat
    sample_layer: Tensor  # int64
    sample_weight: Tensor  # fp32: how many elements each one stands for


class LayerSums:
    """The sums of one step; ``sums`` is (3, G): gradient, update, weights."""

    def __init__(self, fragments: Callable[[], Sequence[Fragment]], layers: Mapping[str, str]):
        """``fragments`` gives those of this rank, each element on one rank only; ``layers`` the
        layer of each parameter.
        """
        self._fragments, self._layers = fragments, layers
        self.names = [*dict.fromkeys(layers.values())]
        self.sums = torch.zeros(3, len(self.names))
        self._wanted = False
        self._flats: dict[tuple[int, int], _Flat] = {}

    def begin(self, wanted: bool) -> None:
        """Start anew; what comes is measured if it is ``wanted``."""
        self._wanted = wanted
        if wanted:
            self.sums.zero_()

    @contextmanager
    def around(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Measure the update that is made inside, of what ``optimizer`` holds at this moment."""
        if not self._wanted:
            yield
            return
        params = [param for group in optimizer.param_groups for param in group["params"]]
        measured = [(param, self._flat(param)) for param in params if param.grad is not None]
        with torch.no_grad():
            before = [self._before(param, flat) for param, flat in measured]
            yield
            for (param, flat), sample in zip(measured, before, strict=True):
                self._after(param, flat, sample)

    def _before(self, param: Tensor, flat: _Flat) -> Tensor:
        """Add up the gradient; return the sample of the weights as they are."""
        assert param.grad is not None
        gradient = param.grad.view(-1)
        pieces = [gradient.narrow(0, *at) for at in zip(flat.begins, flat.numels, strict=True)]
        if pieces:
            norms = torch.stack(torch._foreach_norm(pieces))
            self._add(0, flat.layer, norms.float().square())
        return param.view(-1)[flat.sample]

    def _after(self, param: Tensor, flat: _Flat, before: Tensor) -> None:
        """Add up how far the sample has moved, and what it is now."""
        now = param.view(-1)[flat.sample]
        self._add(1, flat.sample_layer, (now - before).float().square() * flat.sample_weight)
        self._add(2, flat.sample_layer, now.float().square() * flat.sample_weight)

    def _add(self, row: int, layer: Tensor, squares: Tensor) -> None:
        if self.sums.device != squares.device:
            self.sums = self.sums.to(squares.device)
        self.sums[row].index_add_(0, layer, squares)

    def _flat(self, param: Tensor) -> _Flat:
        """Return what lies in ``param``, which is looked up once."""
        key = (param.data_ptr(), param.numel())
        if key not in self._flats:
            self._flats[key] = self._look(param)
        return self._flats[key]

    def _look(self, param: Tensor) -> _Flat:
        """Return where this rank's fragments lie in ``param``."""
        storage = param.untyped_storage().data_ptr()
        begins, numels, layer = list[int](), list[int](), list[int]()
        for fragment in self._fragments():
            weight = fragment.tensors["weight"]
            begin = int(weight.storage_offset()) - int(param.storage_offset())
            inside = 0 <= begin < param.numel()
            if inside and weight.untyped_storage().data_ptr() == storage:
                begins.append(begin)
                numels.append(fragment.numel)
                layer.append(self.names.index(self._layers[fragment.name]))
        return _sampled(begins, numels, layer, device=param.device)


def _sampled(
    begins: list[int], numels: list[int], layer: list[int], *, device: torch.device
) -> _Flat:
    """Return a ``_Flat`` of fragments, each sampled at equal distances."""
    samples, counts = list[Tensor](), list[int]()
    for begin, numel in zip(begins, numels, strict=True):
        # odd, so that no sample stays in one column of a matrix
        stride = -(-numel // SAMPLE) | 1
        samples.append(torch.arange(begin, begin + numel, stride))
        counts.append(len(samples[-1]))
    sizes = torch.tensor(counts, dtype=torch.int64)
    of_layer = torch.tensor(layer, dtype=torch.int64)
    stands_for = torch.tensor(numels, dtype=torch.float32) / sizes
    return _Flat(
        begins,
        numels,
        of_layer.to(device),
        torch.cat(samples or [sizes]).to(device),
        of_layer.repeat_interleave(sizes).to(device),
        stands_for.repeat_interleave(sizes).to(device),
    )
