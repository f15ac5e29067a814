"""Do the parts of a run fit together? Answered on a login node, in seconds: nothing is built, and
DeepSpeed is not imported.
"""

from __future__ import annotations

from functools import partial

from hfscale.checkpoint import layout
from hfscale.checkpoint.manifest import SMALL, verify
from hfscale.checkpoint.pretrained import labels_of, match, tell
from hfscale.checkpoint.weights import open_weights
from hfscale.config.rules import Length, notices, run_length
from hfscale.config.schema import TrainConfig
from hfscale.dist.world import World
from hfscale.errors import ConfigError, nearest
from hfscale.jobs.material import open_material
from hfscale.log import logger
from hfscale.models.build import accepted, check_head, check_model_config
from hfscale.models.trained import choose_trained
from hfscale.run.origin import (
    check_padding,
    model_needs,
    pretrained_folder,
    skeleton,
    warn_of_tokenizer,
)


def check(config: TrainConfig) -> None:
    """Return if tokenizer, data, objective or task, model and pretrained weights fit together.

    Raises:
        UserError: for the first of them that does not.
    """
    folder = pretrained_folder(config)
    material = open_material(config, World(), folder)
    material.digests()  # which opens all of its data
    objective = material.objective()
    if (best := config.checkpoint.keep_best) and best.metric not in (
        given := {f"validation_{name}" for name in objective.validated()}
    ):
        raise ConfigError(
            "no validation gives this metric",
            where="checkpoint.keep_best.metric",
            value=best.metric,
            remedy=nearest(best.metric, given),
        )
    model_config = check_model_config(
        **model_needs(config, material.tokenizer, folder, also=material.needs)
    )
    check_head(model_config, objective.auto_model)
    check_padding(model_config, material.tokenizer)
    if material.rows or config.train.epochs is None:
        length = run_length(config.train, rows=material.rows, seq_len=config.data.seq_len)
        say_notices(config, rows=material.rows, length=length)
    begins = folder and not layout.newest_state(config.run_dir)
    shape = accepted(partial(skeleton, config, model_config, objective.auto_model), config.model)
    choose_trained(shape, config.model)
    if folder and begins:
        reader = open_weights(folder, check=partial(verify, up_to=SMALL))
        tell(match(shape, reader, labels=labels_of(folder)), shape)
        warn_of_tokenizer(folder, material.tokenizer)


def say_notices(config: TrainConfig, *, rows: int, length: Length) -> None:
    """Log what is allowed but probably not meant, and could not be known before the data was
    read.
    """
    known = notices(config)
    for line in notices(config, rows=rows, length=length):
        if line not in known:
            logger.info(f"notice: {line}")


def parameters(config: TrainConfig) -> int:
    """Return how many weights the model of a run has."""
    folder = pretrained_folder(config)
    material = open_material(config, World(), folder)
    needs = model_needs(config, material.tokenizer, folder, also=material.needs)
    model = skeleton(config, check_model_config(**needs), material.objective().auto_model)
    return sum(weight.numel() for weight in model.parameters())
