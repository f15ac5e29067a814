"""Do the parts of a run fit together? Answered on a login node, in seconds: nothing is built, and DeepSpeed is not imported."""
from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from hfscale.checkpoint import layout
from hfscale.config.schema import RunConfig
from hfscale.errors import DataError
from hfscale.models.build import check_model_config, special_ids
from hfscale.objectives.base import Setting, load_objective
from hfscale.stream.mixture import open_mixture
from hfscale.stream.rows import TokenRows
from hfscale.tokenizer import end_of_document_id, load_tokenizer, tokenizer_digest, vocabulary_size


def check(config: RunConfig) -> None:
    """Return if tokenizer, shards, objective and model fit together.

    Raises:
        UserError: for the first of them that does not.
    """
    tokenizer = load_tokenizer(config.tokenizer.path)
    open_mixture(config, [open_rows(source.shards, config, tokenizer) for source in config.data.sources],
                 saved=layout.newest_state(config.run_dir))
    if config.data.validation is not None:
        open_rows(config.data.validation.shards, config, tokenizer)
    load_objective(config.objective, Setting(seq_len=config.data.seq_len, tokenizer=tokenizer))
    check_model_config(config.model, **model_needs(config, tokenizer))


def model_needs(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return what the run asks of its model, as keywords of ``check_model_config`` and ``build_model``."""
    return {"vocab_size": vocabulary_size(tokenizer), "seq_len": config.data.seq_len, "overrides": special_ids(tokenizer)}


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
