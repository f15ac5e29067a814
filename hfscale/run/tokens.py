"""Shards of tokens, or of raw text, for a pretraining objective."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from transformers import PretrainedConfig, PreTrainedTokenizerFast

from hfscale.checkpoint.state import CheckpointState
from hfscale.config.inference import ShardsConfig
from hfscale.config.schema import RunConfig
from hfscale.dist.world import World
from hfscale.errors import DataError
from hfscale.log import logger
from hfscale.objectives.base import Objective, Setting, load_objective
from hfscale.run.data import OpenData
from hfscale.run.sources import Sources, token_rows
from hfscale.stream.loader import EvaluationRows, Stream
from hfscale.stream.mixture import Mixture
from hfscale.stream.prepared import RowSource, RunRows
from hfscale.stream.rows import TokenRows
from hfscale.stream.sources import kept_manifest
from hfscale.stream.state import StreamState
from hfscale.stream.text import HeldOutText, TextRows, open_encoders
from hfscale.tokenizer import (
    end_of_document_id,
    load_tokenizer,
    tokenizer_digest,
    vocabulary_size,
)
from hfscale.training.evaluator import Evaluator
from hfscale.training.sampler import SHOWN


class TokenData:
    """The shards that a config names, and the tokenizer that made them (``RunData``).

    Raises:
        UserError: if it did not make them, or one of them cannot be had.
    """

    def __init__(self, config: RunConfig, world: World, sources: Sources) -> None:
        self._config, self._world, self._sources = config, world, sources
        self.needs: Mapping[str, object] = {}
        self.tokenizer = load_tokenizer(config.tokenizer.path)
        named = zip(config.data.sources, sources.parts, strict=True)
        parts = [(source.shards, rows) for source, rows in named]
        if sources.held_out and config.data.validation:
            parts.append((config.data.validation.shards, sources.held_out))
        for place, rows in parts:
            self._check(rows, place)

    def _check(self, rows: TokenRows, place: str) -> None:
        check_tokenizer(
            rows,
            self.tokenizer,
            digest=self.tokenizer_digest,
            place=place,
            path=self._config.tokenizer.path,
        )

    @cached_property
    def tokenizer_digest(self) -> str:
        """What names the tokenizer."""
        return tokenizer_digest(self.tokenizer)

    @property
    def rows(self) -> int:
        """Rows of an epoch; 0: not known before raw text is tokenized."""
        return self._sources.rows

    def objective(self, model_config: PretrainedConfig | None = None) -> Objective:
        """Return the objective; without ``model_config`` it can say what model it wants."""
        config, train = self._config, self._config.train
        return load_objective(
            config.objective,
            Setting(
                seq_len=config.data.seq_len,
                micro_batch=train.micro_batch,
                global_batch=train.global_batch,
                seed=config.run.seed,
                data=self._world.data,
                cross_document=config.data.cross_document,
                sources=len(config.data.sources),
                tokenizer=self.tokenizer,
                model_config=model_config,
            ),
        )

    def digests(self) -> dict[str, str]:
        """Return the digest of each manifest, by key of the config."""
        named = zip(self._config.data.sources, self._sources.manifests, strict=True)
        digests = {f"data.sources, {source.name}": part.fingerprint for source, part in named}
        if held_out := self._sources.held_out:
            digests["data.validation"] = held_out.fingerprint
        return digests

    def open(
        self, objective: Objective, *, saved: CheckpointState | None, pin_memory: bool
    ) -> OpenData:
        """Return the data as ``objective`` takes it, where ``saved`` left it. The run keeps the
        manifests.
        """
        config, data, world = self._config, self._config.data, self._world
        tokens, order = self._sources.plan(saved)
        for manifest in self._sources.manifests if world.all.rank == 0 else ():
            manifest.save(kept_manifest(config.run_dir, manifest.fingerprint))
        position = saved.position if saved else None
        rows: RunRows = self._text(tokens, order, position) if order.raw else tokens
        stream = Stream(
            rows,
            order,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            place=world.data,
            state=position,
            prefetch_steps=data.prefetch_steps,
            pin_memory=pin_memory,
            with_documents=objective.needs_documents or not data.cross_document,
        )
        evaluator, validate_every, shown = None, 0, None
        if data.validation and self._sources.held_out:
            scored = held_out_rows(
                self._sources.held_out, config, objective, world, count=data.validation.rows
            )
            evaluator, validate_every = Evaluator(objective, scored), data.validation.every_steps
            shown = scored.first(SHOWN) if config.metrics.samples else None
        about = {"data_fingerprint": order.fingerprint, "data": dict(order.fingerprints)}
        return OpenData(stream, order.names, evaluator, validate_every, about, shown)

    def _text(self, tokens: TokenRows, order: Mixture, position: StreamState | None) -> TextRows:
        """Return the rows of a mixture with raw text, which is tokenized as it comes."""
        config, world = self._config, self._world
        forged = position is not None and position.text == 1
        if forged and world.all.rank == 0:
            logger.warning(
                "this run on raw text began when text that spells a control token became one; so "
                "it goes on"
            )
        return TextRows(
            tokens,
            order,
            open_encoders(config, self.tokenizer, local_ranks=world.local_ranks, forged=forged),
            state=position,
            global_batch=config.train.global_batch,
            place=world.data,
        )


def open_rows(
    shards: str, config: RunConfig | ShardsConfig, tokenizer: PreTrainedTokenizerFast
) -> TokenRows:
    """Return the rows of a manifest, after checking that this tokenizer made them.

    Raises:
        DataError: if another one did, or there are ids that it cannot give.
    """
    rows = token_rows(shards, config)
    digest = tokenizer_digest(tokenizer)
    check_tokenizer(rows, tokenizer, digest=digest, place=shards, path=config.tokenizer.path)
    return rows


def held_out_rows(
    tokens: TokenRows,
    config: RunConfig | ShardsConfig,
    objective: Objective,
    world: World,
    *,
    count: int | None,
) -> EvaluationRows:
    """Return ``count`` rows of a manifest, or all of them, as the objective scores them; raw text
    is made tokens now.

    Raises:
        DataError: if there is not text enough for one.
    """
    rows: RowSource = tokens
    count = count or int(tokens.shard_rows.sum())
    if tokens.raw:
        tokenizer = objective.setting.tokenizer
        encoders = open_encoders(config, tokenizer, local_ranks=world.local_ranks)
        rows = HeldOutText(tokens, encoders, count=count)
    return EvaluationRows(
        rows,
        count=count,
        micro_batch=config.train.micro_batch,
        place=world.data,
        with_documents=objective.needs_documents or not config.data.cross_document,
    )


def check_tokenizer(
    rows: TokenRows, tokenizer: PreTrainedTokenizerFast, *, digest: str, place: str, path: str
) -> None:
    """Return if ``tokenizer``, of this digest, made the rows at ``place``; ``path`` is where the
    config has it from. Raw text needs one that ends documents.

    Raises:
        DataError: if another one did, or there are ids that it cannot give.
    """
    if rows.raw:
        end_of_document_id(tokenizer)
        return
    made_by, max_id = rows.manifest.tokenizer, rows.manifest.max_id
    assert made_by is not None, "token shards name their tokenizer"
    if max_id >= (size := vocabulary_size(tokenizer)):
        raise DataError(
            "these shards hold ids that the tokenizer does not have",
            where=place,
            value=f"id {max_id}, vocabulary {size}",
            remedy="build the shards again with this tokenizer, or give back the one that made "
            "them",
        )
    if made_by.eod_id != (end_id := end_of_document_id(tokenizer)):
        raise DataError(
            "documents in these shards end with another token than this tokenizer's",
            where=place,
            value=f"id {made_by.eod_id}, not {end_id}",
            remedy="give back the tokenizer that made them, or build the shards again",
        )
    if made_by.digest != digest:
        raise DataError(
            "these shards were made with another tokenizer",
            where=place,
            value=f"{made_by.digest[:16]}, not {digest[:16]}",
            remedy="point tokenizer.path at the one that made them (now "
            f"{path}), or build the shards again",
        )
