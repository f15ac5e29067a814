"""What the model of a run is made from: its config, its tokenizer, its shapes, and the weights that
it begins with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_flash_attn_2_available

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.checkpoint.base import check_base
from hfscale.checkpoint.manifest import SMALL, verify
from hfscale.checkpoint.weights import checked
from hfscale.config.load import load_config
from hfscale.config.schema import Model, TrainConfig
from hfscale.errors import ConfigError
from hfscale.hub import GenerationFile, local_folder
from hfscale.log import logger
from hfscale.models.build import OFFSET_POSITIONS, accepted, construct, first_line, special_ids
from hfscale.objectives.draws import lacking
from hfscale.records import load
from hfscale.tokenizer import FILE_NAME, tokenizer_digest, vocabulary_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tokenizer_folder(config: TrainConfig, pretrained: Path | None) -> Path | str:
    """Return where the run's tokenizer is: as the config says, or the run's own, or that of the
    model it begins with.
    """
    if config.tokenizer is not None:
        path: Path | str = config.tokenizer.path
        return path
    if (config.run_dir / run_files.TOKENIZER).is_dir():
        return config.run_dir / run_files.TOKENIZER
    assert pretrained is not None, "config/rules.py has refused it"
    if not (pretrained / layout.STATE).is_file():
        return pretrained
    return tokenizer_folder(run_config(pretrained), None)


def run_config(checkpoint: Path) -> TrainConfig:
    """Return the config of the run that ``checkpoint`` is of, wherever the run lies now."""
    run_dir = run_files.run_of(checkpoint)
    moved = [f"run.root={json.dumps(str(run_dir.parent))}", f"run.name={json.dumps(run_dir.name)}"]
    return load_config(run_dir / run_files.CONFIG, moved).config


def pretrained_folder(config: TrainConfig, *, fresh: bool = False) -> Path | None:
    """Return the folder with the model's config and weights that ``model.pretrained`` stands for,
    None where it is not given.

    A run that has saved needs its source no more: then it is the run's own newest checkpoint,
    unless it begins ``fresh``. Of a checkpoint the small files have been verified, the model's
    config among them; the weights are when they are read.

    Raises:
        UserError: if it is nothing that could have weights.
    """
    if (name := config.model.pretrained) is None:
        return None
    if not fresh and (own := _own_folder(config)):
        return own
    theirs = layout.checkpoint_of(name)
    return checked(theirs) if theirs else local_folder(name, where="model.pretrained", weights=True)


def _own_folder(config: TrainConfig) -> Path | None:
    """Return the newest good checkpoint of the run, or what its adapters stand beside."""
    state = layout.newest_state(config.run_dir) if config.model.lora else None
    if state and state.adapters:
        base = Path(state.adapters.folder)  # which the run does not save
        if not base.is_dir():
            check_base(state.adapters, where=config.run_dir)
        return base
    saved = reversed(layout.committed(config.run_dir / run_files.CHECKPOINTS))
    return next((path for path in saved if not verify(path, up_to=SMALL)), None)


def check_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse (ConfigError) a model that counts positions from a padding token, and has none."""
    if config.model_type in OFFSET_POSITIONS - {"mpnet"} and config.pad_token_id is None:
        why = (
            f"{config.model_type} counts positions from a padding token, and this "
            "tokenizer has none of its own"
        )
        raise lacking(tokenizer, why, add="pad='<pad>'")


def generate_as(model: PreTrainedModel, folder: Path | None) -> None:
    """Let ``model`` generate as its source ``folder`` says, where it does: its config.json knows
    nothing of that.
    """
    if folder and model.can_generate() and (folder / layout.GENERATION).is_file():
        file = folder / layout.GENERATION
        load(file, GenerationFile, what="how the model generates")
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # transformers' own checks of values
            raise ConfigError(
                "how the model generates cannot be read", where=file, value=first_line(error)
            ) from error


def warn_of_tokenizer(folder: Path, digest: str, *, place: str = "") -> None:
    """Say so if the weights in ``folder`` are known to be those of another tokenizer than that of
    ``digest``, which was loaded from ``place``.
    """
    if place == str(folder):
        return
    theirs = ""
    if (folder / layout.STATE).is_file():
        theirs = layout.state_of(folder).tokenizer_digest
    elif (folder / FILE_NAME).is_file():
        theirs = tokenizer_digest(folder)
    if theirs not in ("", digest):
        logger.warning(
            f"the weights of {folder} are those of another tokenizer: what id means what token "
            "must be the same"
        )


class Needs(TypedDict):
    """What a run asks of its model: keywords of ``check_model_config`` and ``build_model``."""

    model: Model
    vocab_size: int
    seq_len: int
    overrides: Mapping[str, object]


def model_needs(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path | None,
    *,
    also: Mapping[str, object] | None = None,
) -> Needs:
    """Return what the run asks of its model, which starts in ``folder`` if any.

    ``also`` are values of the model's config that a task needs; those of ``model.config`` win.
    """
    start = {} if folder is None else {"pretrained": str(folder), "architecture": None}
    model = config.model.model_copy(
        update={"config": {**(also or {}), **config.model.config}, **start}
    )
    return {
        "model": model,
        "vocab_size": vocabulary_size(tokenizer),
        "seq_len": config.data.seq_len,
        "overrides": special_ids(tokenizer),
    }


def lacks_flash_attention(config: TrainConfig) -> bool:
    """Return whether a run asks for flash-attn where it is not installed."""
    return config.model.attention == "flash_attention_2" and not is_flash_attn_2_available()


def skeleton(
    config: TrainConfig, model_config: PretrainedConfig, auto_model: str
) -> PreTrainedModel:
    """Return the model on the meta device: shapes and ties, no numbers."""
    available = "auto" if lacks_flash_attention(config) else config.model.attention
    model: PreTrainedModel = accepted(
        lambda: construct(
            model_config,
            auto_model,
            dtype=DTYPES[config.engine.precision],
            attention=available,
            trust_remote_code=config.model.trust_remote_code,
            context=lambda: torch.device("meta"),
        ),
        config.model,
    )
    # a plain construction leaves that for later; untied, an embedding would be counted and exported
    # twice
    model.tie_weights()
    return model
