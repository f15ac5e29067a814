"""What one micro-batch holds and computes: a forward and a backward pass on the meta device, where
tensors have shapes and no memory, watched operator by operator.

So it holds for any architecture, with checkpointing or without, and needs neither a device nor its
memory. Counted are the bytes of distinct storages from when an operator makes them until nobody
refers to them; each gradient of a weight leaves as soon as it is whole, as in the engine, which
keeps gradients elsewhere (``memory.py``). Attention counts as the fused kernel of the device that
is planned for. What an operator holds inside itself (workspaces of cuBLAS, say) is not seen.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from hfscale.objectives.cross_entropy import META_IS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDED = 512  # bytes: what torch's allocator of GPUs rounds up to
Work = tuple[float, float]  # flops of an operator, bytes that it reads and writes
Operator = Any  # of torch: its functions, what they are called with and what they give
Keywords = dict[str, Operator]
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

BIASED = torch.ops.aten._scaled_dot_product_efficient_attention
GROUPED = (F.grouped_mm, torch._grouped_mm) if hasattr(F, "grouped_mm") else ()


@dataclass
class Trace:
    """One micro-batch of one model. Bytes are beside weights, their gradients and the inputs."""

    saved: float = 0.0  # after the forward pass: kept for the backward
    peak: float = 0.0  # the most at any moment
    kinds: dict[str, float] = field(default_factory=dict)  # of ``saved``: part of a layer -> bytes
    work: list[Work] = field(default_factory=list)


class Step(Protocol):
    """What is known of one micro-batch."""

    def of(self, figure: Callable[[Trace], float]) -> float:
        """Return ``figure`` of the whole model."""

    @property
    def how(self) -> str:
        """How it is known, for people."""


@dataclass(frozen=True)
class Rows:
    """A micro-batch of ``rows``, by those of ``few`` and of twice as many: all of it is linear in
    them.
    """

    one: Step
    two: Step
    rows: int
    few: int = 1

    def of(self, figure: Callable[[Trace], float]) -> float:
        """Return ``figure`` of ``rows`` rows."""
        begin = self.one.of(figure)
        return begin + (self.two.of(figure) - begin) * (self.rows / self.few - 1)

    @property
    def how(self) -> str:
        """Which were traced."""
        return f"{self.one.how}, by {self.few} and {2 * self.few} rows"


class Watch(TorchDispatchMode):
    """Counts the bytes of distinct storages, and the work of each operator."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.work: list[Work] = []
        self._sizes = WeakIdKeyDictionary()
        for tensor in known:
            self._sizes[tensor.untyped_storage()] = 0

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Operator = (), kwargs: Keywords | None = None
    ) -> Operator:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [self._add(one) for one in tree_leaves(out) if isinstance(one, Tensor)]
        if any(made) or func._schema.is_mutable:  # a view computes nothing
            read = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            self.work.append((_flops(func, args, kwargs, out), _moved(read, out)))
        return out

    def _add(self, tensor: Tensor) -> bool:
        """Count the storage of ``tensor``; return whether it is new."""
        storage = tensor.untyped_storage()
        if storage in self._sizes:
            return False
        size = -(-storage.nbytes() // ROUNDED) * ROUNDED
        self._sizes[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)
        return True

    def _free(self, size: int) -> None:
        self.live -= size


class OtherDevice(TorchFunctionMode):
    """Lets the meta device do what another one would: attention in one fused kernel (a CPU has none
    with dropout or with a bias that is trained), and answers where a model asks for a value. A mask
    that is asked about has no padding in it.
    """

    def __init__(self, *, on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu

    def __torch_function__(
        self, func: Operator, types: object, args: Operator = (), kwargs: Keywords | None = None
    ) -> Operator:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout and not self._on_cpu:  # of its kernel a GPU keeps a byte a number
            return self._dropout(*args, **kwargs)
        if func in GROUPED:
            return _Grouped.apply(*args[:2])  # type: ignore[no-untyped-call]
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if func is torch.Tensor.item and args[0].is_meta:
            return 1
        if func is torch.Tensor.__contains__ and args[0].is_meta:  # padding, among ids
            return False
        return func(*args, **kwargs)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        width, biased = query.shape[-1], attn_mask is not None and attn_mask.requires_grad
        fused = key.shape[-1] == value.shape[-1] == width and query.dim() == 4
        if not fused or (self._on_cpu and (dropout_p or biased)):
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        if attn_mask is not None and biased:
            shape = (*query.shape[:3], key.shape[2])
            out, *_ = BIASED(query, key, value, attn_mask.expand(shape), True, scale=scale)
            return cast(Tensor, out)
        out, _ = ATTENTION(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
        return cast(Tensor, out)


class _Grouped(torch.autograd.Function):
    """A product of experts with rows sorted by expert: each row is multiplied once. torch's own
    wants 16 bit on the meta device.
    """

    @staticmethod
    def forward(ctx: Operator, rows_ND: Tensor, weights_EDM: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, weights_EDM)
        return rows_ND @ weights_EDM[0]

    @staticmethod
    def backward(ctx: Operator, grad_NM: Tensor) -> tuple[Tensor, Tensor]:
        rows_ND, weights_EDM = ctx.saved_tensors
        _ = rows_ND.T @ grad_NM  # its work; the result is one expert's
        return grad_NM @ weights_EDM[0].T, torch.empty_like(weights_EDM)


def _flops(func: Operator, args: Operator, kwargs: Keywords, out: Operator) -> float:
    packet = func._overloadpacket
    if packet in (ATTENTION, ATTENTION_BACKWARD):
        forward = packet is ATTENTION
        query, key = args[0:2] if forward else args[1:3]
        causal = (list(args) + [False] * 9)[4 if forward else 7] is True
        products = 2 if forward else 5
        pairs = query.shape[-2] * key.shape[-2] * (0.5 if causal else 1.0)
        heads, width = query.shape[0] * query.shape[1], query.shape[-1]
        return float(2 * products * heads * pairs * width)
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0.0


def _moved(read: Sequence[Tensor], out: Operator) -> float:
    written = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
    return float(sum(one.numel() * one.element_size() for one in (*read, *written)))


def trace(
    model: PreTrainedModel,
    run: Callable[[nn.Module], Tensor],
    *,
    inputs: Iterable[Tensor],
    on_cpu: bool = False,
    parts_of: Sequence[nn.Module] = (),
) -> Trace:
    """Return what ``run``, which maps the model on the meta device to a loss, and its backward pass
    hold. ``parts_of`` are layers whose parts are told apart.
    """
    result = Trace()
    weights = [*model.parameters(), *model.buffers()]
    watch = Watch([*weights, *inputs])
    handles = [
        weight.register_post_accumulate_grad_hook(_drop_gradient)
        for weight in model.parameters()
        if weight.requires_grad
    ]
    told_apart = _hooks(parts_of, watch, result.kinds)
    token = META_IS.set("cpu" if on_cpu else "cuda")
    try:
        with watch:
            with OtherDevice(on_cpu=on_cpu):
                loss = run(model)
            result.saved = watch.live
            for handle in told_apart:  # what is computed again is not kept
                handle.remove()
            loss.backward()  # no mode of functions reaches into it: see ``checkpoint``
            del loss
    finally:
        META_IS.reset(token)
        for handle in handles:
            handle.remove()
    result.peak, result.work = watch.peak, watch.work
    return result


def checkpoint(model: PreTrainedModel, *, on_cpu: bool = False) -> None:
    """Turn activation checkpointing on, as the engine does; what is computed again is computed as
    the first time.
    """

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), OtherDevice(on_cpu=on_cpu)

    how = {"use_reentrant": False, "context_fn": contexts}
    with quiet():
        model.gradient_checkpointing_enable(how)  # type: ignore[operator]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings of names that older releases do not know yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


def _hooks(layers: Sequence[nn.Module], watch: Watch, kinds: dict[str, float]) -> list[Operator]:
    """Have the bytes that each part of ``layers`` keeps added up by its name."""
    handles = []
    for layer in layers:
        for name, part in layer.named_children():
            before: list[int] = []

            def enter(*_: object, before: list[int] = before) -> None:
                before.append(watch.live)

            def leave(*_: object, before: list[int] = before, name: str = name) -> None:
                if before:
                    kinds[name] = kinds.get(name, 0.0) + watch.live - before.pop()

            handles.append(part.register_forward_pre_hook(enter))
            handles.append(part.register_forward_hook(leave))
    return handles
