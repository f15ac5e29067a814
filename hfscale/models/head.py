"""The head of a language model: the linear module that makes logits of hidden states, and what the
model does to them afterwards.

Models scale their logits (Cohere, Granite), cap them (Gemma 2), or add a bias (BART). Which of them
a model does is not looked up but heard: it is run once, and every function that its logits go
through is noted, so that it can be done again to a part of them.

Shape legend: N tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hfscale.models.call import Model, live

Operator = Any  # of torch: its functions, what they are called with and what they give
# functions that give each number its own answer, by torch's names
ELEMENTWISE = {"add", "sub", "mul", "div", "tanh", "to", "float", "type", "type_as"}
UNCHANGED = {"detach", "contiguous", "clone"}  # what they give has the same numbers


class UnknownHead(Exception):
    """Why nothing is known of what a model does to its logits, for people."""


@dataclass(frozen=True)
class _Logits:
    """Stands for the logits among the arguments of a function."""


@dataclass(frozen=True)
class After:
    """What a model does to its logits, number by number: functions, in their order."""

    steps: tuple[tuple[Operator, tuple[Operator, ...], Mapping[str, Operator]], ...] = ()

    def __call__(self, logits_NV: Tensor) -> Tensor:
        """Return what becomes of logits, which may be those of a part of the tokens."""
        for function, args, kwargs in self.steps:
            args, kwargs = _put(logits_NV, (args, kwargs))
            logits_NV = function(*args, **kwargs)
        return logits_NV

    @property
    def names(self) -> str:
        """The functions, for people."""
        return ", ".join(function.__name__ for function, *_ in self.steps) or "nothing"


def _put(logits_NV: Tensor, arguments: Operator) -> Operator:
    return tree_map(lambda one: logits_NV if isinstance(one, _Logits) else one, arguments)


def head_of(model: Model) -> nn.Linear:
    """Return the head of ``model``, an engine or a bare model.

    Raises:
        UnknownHead: if it has none, or one that is no plain linear module.
    """
    get = getattr(live(model), "get_output_embeddings", None)
    head = get() if get else None
    if head is None:
        raise UnknownHead("it has no head that gives logits of tokens")
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        raise UnknownHead(f"its head is no plain linear module but {type(head).__name__}")
    assert isinstance(head, nn.Linear)
    return head


@contextmanager
def answering(head: nn.Linear, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Return a context in which ``head`` gives ``answer(hidden)``. The model calls it as ever, with
    all hooks: inside the forward pass of an engine, so that ZeRO 3 has gathered its weight.
    """
    head.forward = answer  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def listen(model: Model, forward: Callable[[], Tensor]) -> tuple[After, Tensor, Tensor]:
    """Return what ``model`` does to its logits, the hidden states that its head was given, and the
    logits, of ``forward``, a pass through the model; without gradients.

    Raises:
        UnknownHead: if they go through anything that is not known to be done number by number.
    """
    head, ear = head_of(model), _Ear()
    given: list[Tensor] = []

    def answer(hidden: Tensor) -> Tensor:
        given.append(hidden)
        logits = nn.Linear.forward(head, hidden)
        ear.logits = logits
        return logits

    with answering(head, answer), ear:
        logits = forward()
    if len(given) != 1:
        raise UnknownHead(f"its head is asked {len(given)} times in a pass")
    if ear.strange:
        raise UnknownHead(f"its logits go through {ear.strange}")
    if ear.logits is None or not ear.holds(logits) or logits.shape[-1] != head.out_features:
        raise UnknownHead("what comes of its head are not its logits")
    return After(tuple(ear.steps)), given[0], logits


def hidden_states(model: Model, forward: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    """Return the hidden states (``shape``, H) that the head is given in ``forward``, a pass through
    ``model``; there are no logits.
    """
    given = list[Tensor]()

    def answer(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden.new_zeros(1, 1, 1)

    with answering(head_of(model), answer):
        forward()
    return given[-1].view(*shape, -1)


class _Ear(TorchFunctionMode):
    """Notes every function that ``logits`` go through, once they are there."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: Tensor | None = None  # as they stand
        self.steps: list[tuple[Operator, tuple[Operator, ...], Mapping[str, Operator]]] = []
        self.strange = ""

    def holds(self, value: object) -> bool:
        """Return whether ``value`` is the logits, or a view of them."""
        if self.logits is None or not isinstance(value, Tensor):
            return False
        return bool(value.untyped_storage()._cdata == self.logits.untyped_storage()._cdata)

    def __torch_function__(
        self,
        func: Operator,
        types: object,
        args: tuple[Operator, ...] = (),
        kwargs: Mapping[str, Operator] | None = None,
    ) -> Operator:
        kwargs = kwargs or {}
        heard = [one for one in tree_leaves((args, kwargs)) if self.holds(one)]
        before = self.logits
        out = func(*args, **kwargs)
        if heard and isinstance(out, Tensor):
            assert before is not None
            self._note(func, args, kwargs, width=before.shape[-1])
            self.logits = out
        return out

    def _note(
        self,
        func: Operator,
        args: tuple[Operator, ...],
        kwargs: Mapping[str, Operator],
        *,
        width: int,
    ) -> None:
        name = func.__name__
        if name in UNCHANGED:
            return
        leaves = tree_leaves((args, kwargs))
        others = [one for one in leaves if isinstance(one, Tensor) and not self.holds(one)]
        if name not in ELEMENTWISE or not all(_constant(one, width) for one in others):
            self.strange = self.strange or name
            return

        def kept(one: Operator) -> Operator:
            if self.holds(one):
                return _Logits()
            return one.reshape(-1) if isinstance(one, Tensor) else one

        args, kwargs = tree_map(kept, (args, kwargs))
        self.steps.append((func, args, kwargs))


def _constant(tensor: Tensor, width: int) -> bool:
    """Return whether ``tensor`` is the same for each token, and is not trained."""
    alike = tensor.numel() == 1 or (tensor.shape[-1:] == (width,) and tensor.numel() == width)
    return alike and not tensor.requires_grad
