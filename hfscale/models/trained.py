"""Which parameters of a model are trained: all of them, all but frozen ones, or LoRA adapters
beside frozen matrices.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from hfscale.config.schema import Model
from hfscale.models.adapters import add_adapters, unknown_name


def choose_trained(model: PreTrainedModel, wanted: Model) -> None:
    """Return with ``model.freeze`` or ``model.lora`` applied to ``model``, which may be partitioned
    or on the meta device.

    Raises:
        ConfigError: if a pattern or a target is found in no name.
    """
    if wanted.lora:
        add_adapters(model, wanted.lora)
    names = dict(model.named_parameters(remove_duplicate=False))
    for number, pattern in enumerate(wanted.freeze):
        matching = [name for name in names if pattern.search(name)]
        if not matching:
            raise unknown_name(
                "no parameter has such a name", f"model.freeze.{number}", pattern.pattern, names
            )
        for name in matching:
            names[name].requires_grad_(False)
