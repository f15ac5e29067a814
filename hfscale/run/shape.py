"""The second stage of a run: what it will train, on which data, and whether these fit together. The
model is on the meta device, DeepSpeed is not imported, and nobody waits for another rank.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PretrainedConfig, PreTrainedModel

from hfscale.checkpoint.manifest import SMALL, verify
from hfscale.checkpoint.pretrained import labels_of, match, tell
from hfscale.checkpoint.weights import open_weights
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.rules import Length, notices
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.errors import ConfigError, nearest
from hfscale.log import logger
from hfscale.models.build import accepted, check_head, check_model_config
from hfscale.models.flops import flops_per_token
from hfscale.models.trained import choose_trained
from hfscale.objectives.base import Objective
from hfscale.run.data import RunData
from hfscale.run.examples import ExampleData
from hfscale.run.origin import (
    Needs,
    check_padding,
    lacks_flash_attention,
    model_needs,
    pretrained_folder,
    skeleton,
    warn_of_tokenizer,
)
from hfscale.run.tokens import TokenData
from hfscale.training.sampler import sampler_class

if TYPE_CHECKING:
    from hfscale.run.run import Run


class Shape:
    """What is known of a run once its data were looked at. Each part is made when it is first asked
    for, and raises a UserError if it does not fit to those before it.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def _config(self) -> TrainConfig:
        return self._run.config

    @cached_property
    def folder(self) -> Path | None:
        """Where the model's config and weights begin; None: with the config of this run alone. Of
        several ranks each may see another one, until they agree (``run/live.py``).
        """
        return pretrained_folder(self._config, fresh=self._run.fresh)

    @cached_property
    def data(self) -> RunData:
        """Tokenizer and data."""
        config, world = self._config, self._run.world
        if isinstance(config, FinetuneConfig):
            return ExampleData(config, world, self.folder)
        assert isinstance(config, RunConfig) and self._run.sources
        return TokenData(config, world, self._run.sources)

    @cached_property
    def objective(self) -> Objective:
        """Objective or task, as long as there is no model."""
        return self.data.objective()

    @cached_property
    def needs(self) -> Needs:
        """What the run asks of its model."""
        return model_needs(self._config, self.data.tokenizer, self.folder, also=self.data.needs)

    @cached_property
    def model_config(self) -> PretrainedConfig:
        """The config of the model, which has the head that the objective asks for."""
        config = check_model_config(**self.needs)
        check_head(config, self.objective.auto_model)
        check_padding(config, self.data.tokenizer)
        return config

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: what is trained, shapes and ties, no numbers."""
        make = partial(skeleton, self._config, self.model_config, self.objective.auto_model)
        model: PreTrainedModel = accepted(make, self._config.model)
        choose_trained(model, self._config.model)
        return model

    @cached_property
    def parameters(self) -> int:
        """How many weights the model has, those of adapters among them."""
        return sum(weight.numel() for weight in self.skeleton.parameters())

    @cached_property
    def flops_per_token(self) -> float:
        """What training on one token costs."""
        return flops_per_token(self.skeleton, seq_len=self._config.data.seq_len)

    def check(self) -> None:
        """Return if tokenizer, data, objective or task, model and pretrained weights fit together.

        Raises:
            UserError: for the first of them that does not.
        """
        data = self.data
        self._refuse_unknown_metric()
        if samples := self._config.metrics.samples:
            sampler_class(self.objective, samples)
        _ = self.model_config
        if length := self._run.length(data.rows):
            say_notices(self._config, rows=data.rows, length=length)
        model = self.skeleton
        if lacks_flash_attention(self._config):  # the nodes may have it all the same
            logger.warning(
                "model.attention=flash_attention_2, and flash-attn is not installed here: ranks "
                "without it refuse the run (pip install 'hfscale[gpu]')"
            )
        if self.folder and not self._run.saved:
            reader = open_weights(self.folder, check=partial(verify, up_to=SMALL))
            tell(match(model, reader, labels=labels_of(self.folder)), model)
            self.warn_of_tokenizer(self.folder)

    def warn_of_tokenizer(self, folder: Path) -> None:
        """Say so if the weights in ``folder`` are known to be those of another tokenizer."""
        data = self.data
        warn_of_tokenizer(folder, data.tokenizer_digest, place=data.tokenizer.name_or_path)

    def _refuse_unknown_metric(self) -> None:
        best = self._config.checkpoint.keep_best
        given = {f"validation_{name}" for name in self.objective.validated()}
        if best and best.metric not in given:
            raise ConfigError(
                "no validation gives this metric",
                where="checkpoint.keep_best.metric",
                value=best.metric,
                remedy=nearest(best.metric, given),
            )


def say_notices(config: TrainConfig, *, rows: int, length: Length) -> None:
    """Log what is allowed but probably not meant, and could not be known before the data was
    read.
    """
    known = notices(config)
    for line in notices(config, rows=rows, length=length):
        if line not in known:
            logger.info(f"notice: {line}")
