"""The load-balancing loss of a mixture of experts, over a whole step however it is cut.

    loss = E * sum over experts e of f_e * p_e

f_e: how often expert e is among the k chosen, p_e: its mean probability, both over all tokens of
the global step and all routers. Only p has a gradient. It is a product of two means, so no sum over
micro-batches gives it: f must be known of the whole step first.

Shape legend: B rows, T tokens, E experts; N = B * T. Source: Fedus et al. 2022, Switch
Transformers, eq. 4 to 6; transformers' ``load_balancing_loss_func`` takes the same figure of one
micro-batch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import transformers
from torch import Tensor, nn

from hfscale.errors import ConfigError
from hfscale.models.call import Model, live
from hfscale.models.kinds import WRITERS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef")
# of the loss as it is known here
PARAMETERS = [
    "gate_logits",
    "num_experts",
    "top_k",
    "attention_mask",
]


@dataclass(frozen=True)
class Balancing:
    """The term of an architecture's own loss: ``coefficient`` is its weight."""

    coefficient: float

    @contextmanager
    def listening(self, model: Model) -> Iterator[list[Tensor]]:
        """Yield a list that receives the logits (N, E) of every router, as the model computes them
        inside.
        """
        logits: list[Tensor] = []
        hooks = []
        for router, index in _routers(live(model)):

            def keep(
                _module: nn.Module,
                _inputs: object,
                output: Tensor | tuple[Tensor, ...],
                index: int = index,
            ) -> None:
                logits.append(output[index] if isinstance(output, tuple) else output)

            hooks.append(router.register_forward_hook(keep))
        try:
            yield logits
        finally:
            for hook in hooks:
                hook.remove()

    def parts(
        self, model: Model, logits: Sequence[Tensor], weight_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ``chosen_E``, how often each expert was (no gradient), and ``probability_BE``,
        summed over the tokens of a row.

        Both are means over the routers, in fp32; tokens of ``weight_BT`` 0 (padding, fillers) count
        nothing.

        Raises:
            ConfigError: if no router was heard, as in a compiled model.
        """
        if not logits and any(True for _ in _routers(live(model))):
            raise ConfigError(
                "the routers of this model cannot be heard: their load-balancing loss would be "
                "left out",
                where="model.config.router_aux_loss_coef",
                value=self.coefficient,
                remedy="set engine.compile=false, or the coefficient to 0 to train without it",
            )
        if not logits:  # every layer of this model is dense
            return torch.zeros(1), torch.zeros(len(weight_BT), 1)
        top_k = live(model).num_experts_per_tok
        weight_N = weight_BT.reshape(-1).float()
        chosen_E = torch.zeros(logits[0].shape[-1], device=logits[0].device)
        probability_BE = torch.zeros(())
        for logits_NE in logits:
            probability_NE = logits_NE.float().softmax(-1)
            chosen_NK = probability_NE.detach().topk(top_k, dim=-1).indices
            ones = weight_N[:, None].expand_as(chosen_NK).reshape(-1)
            chosen_E = chosen_E.index_add(0, chosen_NK.reshape(-1), ones)
            weighted_NE = probability_NE * weight_N[:, None]
            sums_BE = weighted_NE.view(*weight_BT.shape, -1).sum(1)
            probability_BE = probability_BE.to(sums_BE.device) + sums_BE
        return chosen_E / len(logits), probability_BE / len(logits)


def balancing(config: PretrainedConfig | None, auto_model: str) -> Balancing | None:
    """Return the term that the class of ``auto_model`` adds to its own loss; None where there is
    none, or its coefficient is 0.

    Raises:
        ConfigError: if the architecture has a loss of its routers that is not the one above.
    """
    if auto_model not in WRITERS:
        return None  # transformers' other heads of a mixture add nothing
    wanted = {key: getattr(config, key, None) or 0.0 for key in COEFFICIENTS}
    kinds = getattr(transformers, auto_model, None)
    model_class = kinds._model_mapping.get(type(config), None) if config and kinds else None
    if model_class is None or not any(wanted.values()):
        return None
    module = sys.modules[model_class.__module__]
    own = getattr(module, "load_balancing_loss_func", None)
    if own is None:
        return None  # the class has the key, and no such loss
    known = list(inspect.signature(own).parameters) == PARAMETERS and _specs(model_class)
    if not known or wanted["router_z_loss_coef"]:
        assert config is not None, "the class was found by it"
        raise ConfigError(
            f"the loss of {config.model_type}'s routers is not known here, and would be left out",
            where="model.config",
            value={key: value for key, value in wanted.items() if value},
            remedy="train without it: "
            + ", ".join(f"model.config.{key}=0" for key, value in wanted.items() if value),
        )
    return Balancing(wanted["router_aux_loss_coef"] or wanted["aux_loss_coef"])


class _Spec(Protocol):
    """Where transformers itself finds the logits of a router."""

    target_class: type[nn.Module]
    index: int
    layer_name: str | None


def _specs(model_class: type[nn.Module]) -> list[_Spec]:
    """Return what transformers itself records of the routers."""
    specs = (getattr(model_class, "_can_record_outputs", None) or {}).get("router_logits", [])
    return specs if isinstance(specs, list) else [specs]


def _routers(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Yield every router of a live model, and where its output has the logits."""
    for name, module in model.named_modules():
        for spec in _specs(type(model)):
            place = f".{spec.layer_name.strip('.')}." if spec.layer_name else "."
            if isinstance(module, spec.target_class) and place in f".{name}.":
                yield module, spec.index
