"""LayerDrop that every rank can train with: all layers are computed, and a dropped one hands on
what it was given.

transformers leaves a dropped layer out, so each rank would use, gather and reduce other parameters
than its peers. Here the layer runs, its output is replaced by its input, and its parameters get a
gradient of exactly zero. The draws are the same: one number a layer, and whatever a dropped layer
itself draws is taken back. Source: Fan et al. 2020 (arXiv 1909.11556).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hfscale.errors import ConfigError


def take_over_layer_drop(model: nn.Module) -> None:
    """Return with every stack of layers in ``model`` that drops some of them doing so by hooks on
    its layers.

    Raises:
        ConfigError: if a module drops layers that are not modules of their own.
    """
    for path, stack in model.named_modules():
        probability = getattr(stack, "layerdrop", 0.0)
        if not isinstance(probability, int | float) or not probability > 0:
            continue
        lists = [child for child in stack.children() if isinstance(child, nn.ModuleList)]
        if len(lists) != 1:
            raise ConfigError(
                f"{type(stack).__name__} drops layers in a way that ranks cannot share",
                where="model.config",
                value=f"layerdrop of {path}: {probability}",
                remedy="set the architecture's key of it (layerdrop, encoder_layerdrop, "
                "decoder_layerdrop) to 0",
            )
        stack.layerdrop = 0.0  # what transformers asks; the config keeps its value
        for layer in lists[0]:
            _Drop(layer, float(probability))


class _Drop:
    """The hooks of one layer: draw before it, replace its output after it."""

    def __init__(self, layer: nn.Module, probability: float) -> None:
        self._probability = probability
        self._before: list[Tensor] | None = (
            None  # the generators' states, of a layer that is dropped
        )
        layer.register_forward_pre_hook(self._draw, with_kwargs=True)
        layer.register_forward_hook(self._replace, with_kwargs=True)

    def _draw(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        dropped = layer.training and bool(torch.rand([]) < self._probability)
        self._before = _generators(_first(args, kwargs).device) if dropped else None

    def _replace(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._before is None:
            return output
        given = _first(args, kwargs)
        _restore(self._before, given.device)
        hidden = output if isinstance(output, Tensor) else output[0]
        assert hidden.shape == given.shape, "a layer hands on what has the shape of its input"
        kept = torch.where(torch.ones((), dtype=torch.bool, device=given.device), given, hidden)
        return kept if isinstance(output, Tensor) else (kept, *output[1:])


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
