"""The kinds of configs, and what holds for each beside the shape of its sections: which of them may
not contradict each other, and what somebody must have permitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hfscale.config import permission, rules
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.inference import HarnessConfig, PredictConfig, ShardsConfig
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.config.section import Section
from hfscale.config.unsafe import unsafe

# the first whose ``marker`` is there says what a config is of
KINDS: tuple[type[Section], ...] = (
    PredictConfig,
    HarnessConfig,
    ShardsConfig,
    FinetuneConfig,
    RunConfig,
)


def kind_of(values: Mapping[str, object]) -> type[Section]:
    """Return what a config with these sections is; a ``RunConfig``, where none of them says."""
    return next((kind for kind in KINDS if kind.marker in values), RunConfig)


def problems(config: Section) -> list[rules.Problem]:
    """Return everything that sections of a valid shape contradict each other in."""
    if isinstance(config, TrainConfig):
        return rules.problems(config)
    if isinstance(config, ShardsConfig):
        return [*unsafe(config.engine.extra, stage=3)]  # as models that only compute are cut
    return []


def permitted(config: Section, *, said: set[str], home: Path) -> tuple[Section, set[str]]:
    """Return ``config`` with what was not permitted taken back, and the keys of that.

    ``said`` are the keys that the command line gives; ``home`` is the folder of the config.
    """
    if not isinstance(config, TrainConfig):
        return config, set()
    settled = permission.settled(config, said=said & {*permission.KEYS}, home=home)
    return settled, permission.asked(config) - permission.asked(settled)
