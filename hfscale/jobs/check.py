"""Do the parts of a run fit together? Answered on a login node, in seconds: nothing is built, and DeepSpeed is not imported."""
from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights
from transformers.utils import is_flash_attn_2_available

from hfscale.checkpoint import layout
from hfscale.checkpoint.manifest import SMALL, verify
from hfscale.checkpoint.pretrained import match
from hfscale.checkpoint.weights import checked, open_weights
from hfscale.config.schema import RunConfig
from hfscale.errors import DataError
from hfscale.hub import local_folder
from hfscale.log import logger
from hfscale.models.build import check_model_config, special_ids
from hfscale.objectives.base import Setting, load_objective
from hfscale.stream.mixture import open_mixture
from hfscale.stream.rows import TokenRows
from hfscale.tokenizer import end_of_document_id, load_tokenizer, tokenizer_digest, vocabulary_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(config: RunConfig) -> None:
    """Return if tokenizer, shards, objective, model and pretrained weights fit together.

    Raises:
        UserError: for the first of them that does not.
    """
    tokenizer = load_tokenizer(config.tokenizer.path)
    open_mixture(config, [open_rows(source.shards, config, tokenizer) for source in config.data.sources],
                 saved=layout.newest_state(config.run_dir))
    if config.data.validation is not None:
        open_rows(config.data.validation.shards, config, tokenizer)
    objective = load_objective(config.objective, Setting(seq_len=config.data.seq_len, tokenizer=tokenizer))
    folder = pretrained_folder(config)
    model_config = check_model_config(**model_needs(config, tokenizer, folder))
    if folder and not layout.newest_state(config.run_dir):
        match(skeleton(config, model_config, objective.auto_model), open_weights(folder, check=partial(verify, up_to=SMALL)))
        warn_of_tokenizer(folder, tokenizer)


def pretrained_folder(config: RunConfig) -> Path | None:
    """Return the folder with the model's config and weights that ``model.pretrained`` stands for, None where it is not given.

    A run that has saved needs its source no more: then it is the run's own newest checkpoint. Of a checkpoint the small files have
    been verified, the model's config among them; the weights are when they are read.

    Raises:
        UserError: if it is nothing that could have weights.
    """
    if (name := config.model.pretrained) is None:
        return None
    saved = reversed(layout.committed(config.run_dir / layout.FOLDER))
    if own := next((path for path in saved if not verify(path, up_to=SMALL)), None):
        return own
    theirs = layout.checkpoint_of(name)
    return checked(theirs) if theirs else local_folder(name, where="model.pretrained", weights=True)


def warn_of_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Say so if the weights in ``folder`` are known to be those of another tokenizer."""
    state, theirs = folder / layout.STATE, None
    if state.is_file() or (folder / "tokenizer.json").is_file():
        theirs = json.loads(state.read_text("utf-8"))["tokenizer_digest"] if state.is_file() else tokenizer_digest(folder)
    if theirs not in (None, tokenizer_digest(tokenizer)):
        logger.warning(f"the weights of {folder} are those of another tokenizer: what id means what token must be the same")


def model_needs(config: RunConfig, tokenizer: PreTrainedTokenizerFast, folder: Path | None) -> dict[str, Any]:
    """Return what the run asks of its model, which starts in ``folder`` if any: keywords of ``check_model_config`` and ``build_model``."""
    model = config.model if folder is None else config.model.model_copy(update={"pretrained": str(folder), "architecture": None})
    return {"model": model, "vocab_size": vocabulary_size(tokenizer), "seq_len": config.data.seq_len, "overrides": special_ids(tokenizer)}


def skeleton(config: RunConfig, model_config: PretrainedConfig, auto_model: str) -> PreTrainedModel:
    """Return the model on the meta device: shapes and ties, no numbers."""
    wanted = config.model.attention
    available = "sdpa" if wanted == "flash_attention_2" and not is_flash_attn_2_available() else wanted
    with torch.device("meta"), no_init_weights():
        model = getattr(transformers, auto_model).from_config(
            model_config, dtype=DTYPES[config.engine.precision], attn_implementation=available,
            trust_remote_code=config.model.trust_remote_code)
    model.tie_weights()  # a plain construction leaves that for later; untied, an embedding would be counted and exported twice
    return model


def open_rows(shards: str, config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> TokenRows:
    """Return the rows of a manifest, after checking that this tokenizer made them.

    Raises:
        DataError: if another one did, or there are ids that it cannot give.
    """
    rows = TokenRows(shards, seq_len=config.data.seq_len, verify=config.data.verify, skip=config.data.on_error == "skip",
                     **config.data.remote)
    if rows.raw:
        end_of_document_id(tokenizer)
        return rows
    assert rows.manifest.tokenizer is not None, "token shards name their tokenizer"
    if rows.manifest.max_id >= vocabulary_size(tokenizer):
        raise DataError("these shards hold ids that the tokenizer does not have", where=shards,
                        value=f"id {rows.manifest.max_id}, vocabulary {vocabulary_size(tokenizer)}",
                        remedy="build the shards again with this tokenizer, or give back the one that made them")
    made_by, have = rows.manifest.tokenizer.digest, tokenizer_digest(tokenizer)
    if made_by != have:
        raise DataError("these shards were made with another tokenizer", where=shards, value=f"{made_by[:16]}, not {have[:16]}",
                        remedy=f"point tokenizer.path at the one that made them (now {config.tokenizer.path}), or build the shards again")
    return rows
