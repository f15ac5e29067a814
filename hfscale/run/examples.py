"""Labelled examples for a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PretrainedConfig

from hfscale import run_files
from hfscale.checkpoint.state import CheckpointState
from hfscale.config.finetune import FinetuneConfig
from hfscale.dist.world import Place, World
from hfscale.errors import counted
from hfscale.log import logger
from hfscale.objectives.base import Objective, Setting, check_options
from hfscale.run.data import OpenData
from hfscale.run.origin import tokenizer_folder
from hfscale.stream.examples import (
    Example,
    ExampleOrder,
    ExampleRows,
    Examples,
    ExampleStream,
)
from hfscale.stream.labelled import LabelledData, Split
from hfscale.tasks.base import Task
from hfscale.tasks.table import cache_key, code_digest, load_task, task_class
from hfscale.tokenizer import load_tokenizer, tokenizer_digest
from hfscale.training.evaluator import TaskEvaluator
from hfscale.training.sampler import first_examples

FEW = 50  # examples, below which a score says little


class ExampleData:
    """The splits of a config's tables as features of its task (``RunData``); ``pretrained`` is
    where its model begins.

    Raises:
        UserError: for examples, a tokenizer or options that do not fit together.
    """

    def __init__(self, config: FinetuneConfig, world: World, pretrained: Path | None) -> None:
        self._config, self._world = config, world
        self.tokenizer = load_tokenizer(tokenizer_folder(config, pretrained))
        kind = task_class(config.task.name)
        options = check_options(kind.Options, config.task.options, where="task.options")
        about = f"{code_digest(kind)} {options.model_dump_json()}"
        data = LabelledData(config.data, kind, about=about)
        self._facts = data.facts(partial(kind.facts_of_training, options))
        if self._facts:  # a table read as what it is not is seen here
            facts = json.dumps(self._facts, ensure_ascii=False)
            logger.info(f"found in the training examples: {facts:.300}")
        task = self.objective()
        self.needs: Mapping[str, object] = task.model_overrides()
        prepared = partial(data.prepared, features=task.answered_features, about=cache_key(task))
        self._train = prepared("train")
        self._validation = prepared("validation") if config.data.validation else None
        if self._validation and (count := self._validation.report.examples) < FEW:
            logger.warning(
                f"validation: {counted(count, 'example')}: scores of so few say little, and "
                "keep_best follows chance"
            )

    @cached_property
    def tokenizer_digest(self) -> str:
        """What names the tokenizer."""
        return tokenizer_digest(self.tokenizer)

    @property
    def rows(self) -> int:
        """Features of the training split."""
        return len(self._train.lengths)

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
        """Return the digest of each split, by key of the config."""
        digests = {"data.train": self._train.fingerprint}
        if self._validation:
            digests["data.validation"] = self._validation.fingerprint
        return digests

    def open(
        self, objective: Objective, *, saved: CheckpointState | None, pin_memory: bool
    ) -> OpenData:
        """Return the data as ``objective`` takes it, where ``saved`` left it. The run keeps its
        tokenizer.
        """
        assert isinstance(objective, Task)
        config, world, train = self._config, self._world, self._train
        if world.all.rank == 0:
            self._keep_tokenizer(config.run_dir / run_files.TOKENIZER)
        stream = self._stream(
            config.train.global_batch,
            config.train.micro_batch,
            world.data,
            saved.stream if saved else None,
        )
        evaluator, validate_every, shown = None, 0, None
        if self._validation:
            evaluator = self._evaluator(objective, self._validation)
            an_epoch = -(-self.rows // config.train.global_batch)
            validate_every = config.data.validate_every_steps or an_epoch
            shown = first_examples(self._validation.features) if config.metrics.samples else None
        about = {"data_fingerprint": train.fingerprint, "facts": self._facts}
        return OpenData(stream, ("train",), evaluator, validate_every, about, shown)

    def step(
        self, first: int, count: int, *, saved: CheckpointState
    ) -> tuple[Examples, list[Example]]:
        """Return the features at ``count`` positions of the run from ``first`` on, and all examples
        of the training split, in the order of their numbers.

        Raises:
            DataError: if ``saved`` is of other examples, or of another order of them.
        """
        position: dict[str, object] = {"consumed_rows": first, "left_out": ()}
        stream = self._stream(count, count, Place(), saved.stream | position)
        [rows] = stream.take()
        stream.close()
        return rows, self._train.examples()

    def _stream(
        self,
        global_batch: int,
        micro_batch: int,
        place: Place,
        state: Mapping[str, object] | None,
    ) -> ExampleStream:
        config, train = self._config, self._train
        order = ExampleOrder(
            train.lengths, seed=config.run.seed, grouped=config.data.length_grouping
        )
        return ExampleStream(
            train.features,
            order,
            fingerprint=train.fingerprint,
            global_batch=global_batch,
            micro_batch=micro_batch,
            place=place,
            state=state,
        )

    def _keep_tokenizer(self, folder: Path) -> None:
        if folder.is_dir():
            return
        with TemporaryDirectory(dir=folder.parent, prefix=".tokenizer.") as scratch:
            whole = Path(scratch) / run_files.TOKENIZER
            self.tokenizer.save_pretrained(whole)
            whole.rename(folder)

    def _evaluator(self, task: Task, split: Split) -> TaskEvaluator:
        """Return what scores the examples of ``split``; rank 0 has them all."""
        rows = ExampleRows(
            split.features,
            split.lengths,
            micro_batch=self._config.train.micro_batch,
            place=self._world.data,
        )
        examples = split.examples() if self._world.all.rank == 0 else []
        return TaskEvaluator(task, rows, examples=examples, of=split.of)
