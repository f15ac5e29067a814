"""Which keys ``model.config`` may have: those that an architecture's own code declares or reads,
and none that it would ignore.

Many architectures read keys that their config class does not declare (``head_dim`` of Qwen 3 MoE,
``position_buckets`` of DeBERTa v3), so the class alone would refuse configs as they were published.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfscale.errors import ConfigError, nearest
from hfscale.hub import refuse_huge

if TYPE_CHECKING:
    from transformers import PretrainedConfig

READ = re.compile(
    r"\bconfig\.([a-z]\w*)"  # config.head_dim, self.config.head_dim
    r"|getattr\(\s*(?:\w+\.)*\w*config,\s*[\"'](\w+)[\"']"  # getattr(config, "head_dim", None)
    r"|kwargs\.(?:pop|get)\(\s*[\"'](\w+)[\"']"  # of a config class that takes older names
)
# read by what all architectures share: rotary positions are converted from these when a config is
# made
SHARED = {"num_labels", "rope_theta", "rope_scaling", "partial_rotary_factor"}
# in published configs, and of no effect on a model: they say who made it, with what, and what else
# it was used for
METADATA = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "model_type",
    "dtype",
    "n_ctx",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
}
ConfigClass = Any  # of transformers: its classes have keys of their own
# attributes of a config that code calls, not values
METHODS = {"get_text_config", "to_dict", "to_diff_dict", "update", "save_pretrained"}


def known_keys(config_class: ConfigClass) -> set[str]:
    """Return the keys that a config of ``config_class`` may be given."""
    declared = {key for key in config_class().to_dict() if not key.startswith("_")}
    return declared | set(config_class.attribute_map) | SHARED | _read_by_its_code(config_class)


@lru_cache
def _read_by_its_code(config_class: ConfigClass) -> frozenset[str]:
    """Return the keys that the files of an architecture read from a config."""
    module = sys.modules[config_class.__module__]
    folder = Path(str(module.__file__)).parent
    files = [*folder.glob("modeling_*.py"), *folder.glob("configuration_*.py")]
    keys = {
        key for file in files for match in READ.findall(file.read_text("utf-8")) for key in match
    }
    return frozenset(keys - METHODS - {""})


def checked_values(
    values: Mapping[str, object], known: set[str], *, architecture: str, like: PretrainedConfig
) -> dict[str, object]:
    """Return ``values`` without metadata; a whole number becomes a float where ``like``, a config,
    has one.

    Raises:
        ConfigError: for a key that the architecture does not know, with the nearest ones, and for
            another architecture's config.
    """
    if values.get("model_type", architecture) != architecture:
        raise ConfigError(
            "this is the config of another architecture",
            where="model.config.model_type",
            value=values["model_type"],
            remedy=f"set model.architecture={values['model_type']}, or take the key out",
        )
    refuse_huge(values, where="model.config")
    kept = {key: value for key, value in values.items() if key not in METADATA - known}
    if unknown := sorted(set(kept) - known):
        offers = "; ".join(f"{key}: {nearest(key, known)}" for key in unknown)
        raise ConfigError(
            f"{architecture} has no such config key",
            where="model.config",
            value=unknown,
            remedy=offers,
        )
    for key, value in kept.items():
        if type(value) is int and isinstance(getattr(like, key, None), float):
            kept[key] = float(value)  # transformers takes no 0 for 0.0
    return kept
