"""What a live model is seen to do before step 1: whether it sees the future, or other documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hfscale.errors import ConfigError
from hfscale.models.kinds import CAUSAL, MASKED
from hfscale.objectives.isolation import check_apart, movement

if TYPE_CHECKING:
    from hfscale.objectives.base import Model, Objective


def check_live(objective: Objective, model: Model, *, device: torch.device | str) -> None:
    """Refuse a causal model that sees the future (an encoder), one of masks that sees only the past
    (a decoder), and one in which documents see each other where they are to be kept apart.

    Raises:
        ConfigError: with the remedy.
    """
    if objective.auto_model not in (CAUSAL.auto_model, MASKED.auto_model):
        return
    config = objective.setting.model_config
    assert config is not None, "check() needs Setting.model_config"
    if not hasattr(config, "vocab_size"):
        raise ConfigError(
            "this model reads more than text",
            where="model.architecture",
            value=config.model_type,
            remedy="choose one of text alone, such as the text part of this one saved by itself",
        )
    moved = sight(objective, model, device=device)
    if objective.auto_model == MASKED.auto_model and not moved:
        raise ConfigError(
            "mlm: the model sees only the past: changing later tokens does not move the logits of "
            "earlier ones",
            where="model.architecture",
            value=config.model_type,
            remedy="choose an encoder (bert, modernbert, ...) without model.config.is_decoder, or "
            "use objective clm",
        )
    if objective.auto_model == CAUSAL.auto_model and moved:
        raise ConfigError(
            "the model sees the future: changing later tokens moves the logits of earlier ones by "
            f"{moved:.3g}",
            where="model.architecture",
            value=config.model_type,
            remedy="choose a causal architecture (gpt2, llama, ...), set "
            "model.config.is_decoder=true, or to pretrain use objective mlm",
        )
    if not objective.setting.cross_document:
        check_apart(objective.logits_of(model, device=device), objective.shape, config=config)


def sight(objective: Objective, model: Model, *, device: torch.device | str) -> float:
    """Return how far the logits of earlier tokens move when later ones change: 0.0 for a causal
    model.
    """
    config, middle = objective.setting.model_config, objective.setting.seq_len // 2
    assert config is not None, "check() needs Setting.model_config"
    return movement(
        objective.logits_of(model, device=device),
        objective.shape,
        config.vocab_size,
        changed=slice(middle, None),
        watched=slice(middle),
    )
