"""What a run trains on, and what follows from it: tokenizer, objective or task, stream, validation.
Of two kinds, with the same verbs.

``tokenizer``, ``needs`` (values that the model's config must have) and ``objective(model_config)``
come first; once there is a model and perhaps a checkpoint, ``open`` gives the stream, and then
``rows`` (of an epoch), ``names`` (of the sources), ``validation``, ``describe``.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerFast

from hfscale import run_files
from hfscale.checkpoint.state import CheckpointState
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.dist.world import World
from hfscale.errors import DataError, counted
from hfscale.log import logger
from hfscale.objectives.base import Objective, Setting, check_options, load_objective
from hfscale.run.origin import tokenizer_folder
from hfscale.stream.examples import ExampleOrder, ExampleRows, ExampleStream
from hfscale.stream.labelled import LabelledData
from hfscale.stream.loader import EvaluationRows, Stream
from hfscale.stream.prepared import RowSource, RunRows
from hfscale.stream.rows import TokenRows
from hfscale.stream.sources import kept_manifest, open_mixture
from hfscale.stream.text import HeldOutText, TextRows, open_encoders
from hfscale.tasks.base import Task, cache_key, code_digest, load_task, task_class
from hfscale.tokenizer import end_of_document_id, load_tokenizer, tokenizer_digest, vocabulary_size
from hfscale.training.evaluator import Evaluator, TaskEvaluator

FEW = 50  # examples, below which a score says little


class TokenMaterial:
    """Shards of tokens, or of raw text, for a pretraining objective."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config, self._world, self.needs = config, world, dict[str, Any]()
        self.tokenizer = load_tokenizer(config.tokenizer.path)
        self._parts = [
            open_rows(source.shards, config, self.tokenizer) for source in config.data.sources
        ]
        raw = any(part.raw for part in self._parts)
        # of an epoch; 0: not known before raw text is tokenized
        self.rows = 0 if raw else sum(int(part.shard_rows.sum()) for part in self._parts)

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
                sources=len(self._parts),
                tokenizer=self.tokenizer,
                model_config=model_config,
            ),
        )

    def digests(self) -> dict[str, str]:
        """Return what names each part of the data, by key of the config; it must be the same on all
        ranks.
        """
        held_out = self._config.data.validation
        named = {
            f"data.sources, {source.name}": part.fingerprint
            for source, part in zip(self._config.data.sources, self._parts)
        }
        return named | (
            {
                "data.validation": open_rows(
                    held_out.shards, self._config, self.tokenizer
                ).fingerprint
            }
            if held_out
            else {}
        )

    def open(
        self, objective: Objective, *, saved: CheckpointState | None, pin_memory: bool
    ) -> Stream:
        """Return the stream, where ``saved`` left it."""
        config, data, world = self._config, self._config.data, self._world
        global_batch = config.train.global_batch
        tokens, self._order = open_mixture(config, self._parts, saved=saved)
        rows: RunRows = tokens
        self.names = self._order.names
        for part in self._parts if world.all.rank == 0 else ():
            part.manifest.save(kept_manifest(config.run_dir, part.fingerprint))
        position = saved.position if saved else None
        if self._order.raw:
            forged = position is not None and position.text == 1
            if forged and world.all.rank == 0:
                logger.warning(
                    "this run on raw text began when text that spells a control token became "
                    "one; so it goes on"
                )
            rows = TextRows(
                tokens,
                self._order,
                open_encoders(
                    config,
                    self.tokenizer,
                    local_ranks=world.local_ranks,
                    forged=forged,
                ),
                state=position,
                global_batch=global_batch,
                place=world.data,
            )
        return Stream(
            rows,
            self._order,
            global_batch=global_batch,
            micro_batch=config.train.micro_batch,
            place=world.data,
            state=position,
            prefetch_steps=data.prefetch_steps,
            pin_memory=pin_memory,
            with_documents=objective.needs_documents or not data.cross_document,
        )

    def validation(self, objective: Objective) -> tuple[Evaluator, int] | None:
        """Return what scores the held-out rows, and after how many steps each time; None where the
        config asks for none.
        """
        if (held_out := self._config.data.validation) is None:
            return None
        scored = held_out_rows(
            held_out.shards, self._config, objective, self._world, count=held_out.rows
        )
        return Evaluator(objective, scored), held_out.every_steps

    def describe(self) -> dict[str, Any]:
        """Return what every checkpoint says of the data."""
        return {"data_fingerprint": self._order.fingerprint, "data": dict(self._order.fingerprints)}


class ExampleMaterial:
    """Labelled examples for a task."""

    def __init__(self, config: FinetuneConfig, world: World, pretrained: Path | None) -> None:
        self._config, self._world = config, world
        self.tokenizer = load_tokenizer(tokenizer_folder(config, pretrained))
        kind = task_class(config.task.name)
        options = check_options(kind.Options, config.task.options, where="task.options")
        self._data = LabelledData(
            config.data, kind, about=f"{code_digest(kind)} {options.model_dump_json()}"
        )
        self._facts = self._data.facts(partial(kind.facts_of_training, options))
        if self._facts:  # a table read as what it is not is seen here
            logger.info(
                "found in the training examples: "
                f"{json.dumps(self._facts, ensure_ascii=False):.300}"
            )
        task = self.objective()
        self.needs = task.model_overrides()
        about = cache_key(task)
        self._train = self._data.prepared("train", task.answered_features, about=about)
        self._validation = (
            self._data.prepared("validation", task.answered_features, about=about)
            if config.data.validation
            else None
        )
        if self._validation and (count := self._validation.report["examples"]) < FEW:
            logger.warning(
                f"validation: {counted(count, 'example')}: scores of so few say little, and "
                "keep_best follows chance"
            )
        self.rows, self.names = len(self._train.lengths), ("train",)

    def objective(self, model_config: PretrainedConfig | None = None) -> Task:
        """Return the task; without ``model_config`` it can say what model it wants, and make
        features.
        """
        config, train = self._config, self._config.train
        return load_task(
            config.task,
            Setting(
                seq_len=config.data.max_length,
                micro_batch=train.micro_batch,
                global_batch=train.global_batch,
                seed=config.run.seed,
                data=self._world.data,
                tokenizer=self.tokenizer,
                model_config=model_config,
                facts=self._facts,
            ),
        )

    def digests(self) -> dict[str, str]:
        """Return what names each split, by key of the config; it must be the same on all ranks."""
        splits = {"data.train": self._train, "data.validation": self._validation}
        return {key: split.fingerprint for key, split in splits.items() if split is not None}

    def open(
        self, objective: Objective, *, saved: CheckpointState | None, pin_memory: bool
    ) -> ExampleStream:
        """Return the stream, where ``saved`` left it. The run keeps its tokenizer."""
        config, world = self._config, self._world
        keep = config.run_dir / run_files.TOKENIZER
        if world.all.rank == 0 and not keep.is_dir():
            with TemporaryDirectory(dir=config.run_dir, prefix=".tokenizer.") as scratch:
                self.tokenizer.save_pretrained(Path(scratch) / run_files.TOKENIZER)
                (Path(scratch) / run_files.TOKENIZER).rename(keep)
        order = ExampleOrder(
            self._train.lengths, seed=config.run.seed, grouped=config.data.length_grouping
        )
        return ExampleStream(
            self._train.features,
            order,
            fingerprint=self._train.fingerprint,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            place=world.data,
            state=saved.stream if saved else None,
        )

    def validation(self, objective: Objective) -> tuple[TaskEvaluator, int] | None:
        """Return what scores the validation split, and after how many steps each time; None where
        the config asks for none.
        """
        if self._validation is None:
            return None
        assert isinstance(objective, Task)
        split, train, world = self._validation, self._config.train, self._world
        rows = ExampleRows(
            split.features,
            split.lengths,
            micro_batch=train.micro_batch,
            place=world.data,
        )
        examples = split.examples() if world.all.rank == 0 else []
        evaluator = TaskEvaluator(objective, rows, examples=examples, of=split.of)
        an_epoch = -(-self.rows // train.global_batch)
        return evaluator, self._config.data.validate_every_steps or an_epoch

    def describe(self) -> dict[str, Any]:
        """Return what every checkpoint says of the data, labels and all."""
        return {"data_fingerprint": self._train.fingerprint, "facts": self._facts}


def open_material(
    config: TrainConfig, world: World, pretrained: Path | None
) -> TokenMaterial | ExampleMaterial:
    """Return the material of a run; ``pretrained`` is where its model begins.

    Raises:
        UserError: for data, a tokenizer or options that do not fit together.
    """
    if isinstance(config, FinetuneConfig):
        return ExampleMaterial(config, world, pretrained)
    assert isinstance(config, RunConfig)
    return TokenMaterial(config, world)


def held_out_rows(
    shards: str, config: RunConfig, objective: Objective, world: World, *, count: int | None
) -> EvaluationRows:
    """Return ``count`` rows of a manifest, or all of them, as the objective scores them; raw text
    is made tokens now.

    Raises:
        DataError: as ``open_rows``.
    """
    tokenizer = objective.setting.tokenizer
    tokens = open_rows(shards, config, tokenizer)
    rows: RowSource = tokens
    count = count or int(tokens.shard_rows.sum())
    if tokens.raw:
        encoders = open_encoders(config, tokenizer, local_ranks=world.local_ranks)
        rows = HeldOutText(tokens, encoders, count=count)
    return EvaluationRows(
        rows,
        count=count,
        micro_batch=config.train.micro_batch,
        place=world.data,
        with_documents=objective.needs_documents or not config.data.cross_document,
    )


def open_rows(shards: str, config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> TokenRows:
    """Return the rows of a manifest, after checking that this tokenizer made them.

    Raises:
        DataError: if another one did, or there are ids that it cannot give.
    """
    rows = TokenRows(
        shards,
        seq_len=config.data.seq_len,
        verify=config.data.verify,
        skip=config.data.on_error == "skip",
        **config.data.remote,
    )
    if rows.raw:
        end_of_document_id(tokenizer)
        return rows
    assert rows.manifest.tokenizer is not None, "token shards name their tokenizer"
    if rows.manifest.max_id >= vocabulary_size(tokenizer):
        raise DataError(
            "these shards hold ids that the tokenizer does not have",
            where=shards,
            value=f"id {rows.manifest.max_id}, vocabulary {vocabulary_size(tokenizer)}",
            remedy="build the shards again with this tokenizer, or give back the one that made "
            "them",
        )
    made_by, have = rows.manifest.tokenizer.digest, tokenizer_digest(tokenizer)
    ends = rows.manifest.tokenizer.eod_id, end_of_document_id(tokenizer)
    if ends[0] != ends[1]:
        raise DataError(
            "documents in these shards end with another token than this tokenizer's",
            where=shards,
            value=f"id {ends[0]}, not {ends[1]}",
            remedy="give back the tokenizer that made them, or build the shards again",
        )
    if made_by != have:
        raise DataError(
            "these shards were made with another tokenizer",
            where=shards,
            value=f"{made_by[:16]}, not {have[:16]}",
            remedy="point tokenizer.path at the one that made them (now "
            f"{config.tokenizer.path}), or build the shards again",
        )
    return rows
