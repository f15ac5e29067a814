"""What every task offers fine-tuning, evaluation and prediction.

A task is an objective whose rows are *features*, made from labelled *examples*:

    row of a file    --columns-->   example {role: value, "id"}
    example          --features-->  one or more features
    features         --collate-->   Batch
    Batch            --loss-->      sums
    Batch            --predict-->   an output a feature
    outputs of an example --answer-->  {"id", "prediction", ...}
    predictions      --score, with the examples themselves as references-->  {name: number}

One example gives one feature as a rule, and several where a long text is read in windows. Features
and outputs are plain lists, numbers and texts, so features can be cached as Arrow and predictions
written as JSONL. Shape legend: B features, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hfscale.config.section import Section
from hfscale.control_tokens import text_alone
from hfscale.log import logger
from hfscale.metrics.measure import Measure
from hfscale.models.kinds import WRITERS
from hfscale.objectives.base import Batch, Model, Objective
from hfscale.objectives.cross_entropy import token_losses
from hfscale.stream.examples import BadExample, Cell, Example, Examples, Facts, Feature
from hfscale.stream.roles import all_but_answers
from hfscale.tasks.padding import reads_padding

if TYPE_CHECKING:
    from transformers import (
        BatchEncoding,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

# what a task says of a feature, as JSON: "prediction" and what goes with it; of an example alike
Output = dict[str, Any]
# what a tokenizer gives the models
MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
)


class Task(Objective):
    """Base of all tasks. Subclasses give ``columns``, ``features``, ``collate``, ``measure``, and
    for the one pass of a model ``term``, ``row_losses`` and ``outputs``; those that need more than
    its logits give ``weights``, ``loss``, ``predict`` and ``judge``.

    ``setting`` holds the tokenizer, ``seq_len`` (the longest feature, in tokens) and ``facts``:
    what ``facts()`` found in the training split, or ``known()`` in a finished model's config.
    """

    # role -> what it holds; a role is read from the column of its name, or what data.columns says
    columns: ClassVar[dict[str, str]] = {}
    optional: ClassVar[frozenset[str]] = frozenset()  # roles that an example need not have
    # roles that training and scoring need, and prediction does not
    answers: ClassVar[frozenset[str]] = frozenset()
    scored: ClassVar[bool] = True  # False: it only predicts
    token_loss: ClassVar[bool] = False
    frame: tuple[str | None, ...] | None = None  # texts are framed as the tokenizer frames them
    code: str | None = (
        # a module whose file goes along with exports, where transformers has no such pipeline any
        # more
        None
    )
    # the names that a validation can give, beside losses
    metrics: ClassVar[frozenset[str]] = frozenset()

    reads_padding: bool = (
        False  # its model does, so that only texts of one length are asked together
    )

    # ------------------------------------------------------------------------------ before training
    def check(self, model: Model, *, device: torch.device | str) -> None:
        """Refuse what ``Objective.check`` does, and look whether the model's answers depend on
        padding.
        """
        super().check(model, device=device)
        if self.auto_model in WRITERS:  # tasks/generation.py looks at what each setting reads
            return
        self.reads_padding = reads_padding(model, pad_id=self.pad_id, device=device)
        if self.reads_padding:
            logger.warning(
                "the answers of this architecture depend on the padding beside a text: "
                "predictions are made of texts "
                "of one length at a time; in training and its validations a batch of unlike "
                "lengths moves them"
            )

    @classmethod
    def facts(cls, options: Section, examples: Iterable[Example]) -> Facts:
        """Return what must be known of all training examples before features can be made (labels,
        say), as JSON.

        Raises:
            BadExample: (``hfscale.stream.examples``) if they contradict each other.
        """
        return {}

    @classmethod
    def facts_of_training(cls, options: Section, examples: Iterable[Example]) -> Facts:
        """Return ``facts`` of examples that are learnt from: what can be scored cannot always.

        Raises:
            BadExample: also if nothing can be learnt from them together.
        """
        return cls.facts(options, examples)

    @classmethod
    def known(cls, config: PretrainedConfig) -> Facts:
        """Return the facts as the config of a model that was fine-tuned for this task, by anybody,
        says them.
        """
        return {}

    @classmethod
    def question(cls, example: Example) -> object:
        """Return what identifies the question that ``example`` asks, as JSON: a share of the
        examples that is held out is chosen by it, so that equal questions are never in two splits,
        whatever their answers. By default all roles but the answers.
        """
        return all_but_answers(example, cls)

    def model_overrides(self) -> dict[str, object]:
        """Return values that the model's config must have: ``num_labels``, ``id2label``, ... They
        are exported with it.
        """
        return {}

    def features(self, example: Example) -> list[Feature]:
        """Return the features of ``example``, with labels where it has its answers.

        Depends on the example, the options, the setting's tokenizer, ``seq_len`` and ``facts``
        alone: it is cached.

        Raises:
            BadExample: if there is nothing to learn or predict from it; such examples are counted
                and shown.
        """
        raise NotImplementedError

    def answered_features(self, example: Example) -> list[Feature]:
        """Return ``features`` of an example that is learnt from or scored.

        Raises:
            BadExample: also where it has no answer.
        """
        return self.features(example)

    # --------------------------------------------------------------------------------- with a model
    def collate(self, rows: Examples) -> Batch:
        """Return the batch of ``rows``, padded to the longest; a row that is not valid (a filler)
        counts nothing.
        """
        raise NotImplementedError

    def validated(self) -> set[str]:
        """Return the names of the loss and its parts, and the metrics."""
        return super().validated() | self.metrics

    def loss(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Return the sums_B of the one term, from the logits of one pass."""
        return {self.term: self.row_losses(self.logits(model, batch), batch)}

    def row_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return ``sums_B`` of the one term, 0 for fillers; here in nats of what is labelled."""
        return token_losses(logits, batch.labels_BT).sum(1)

    def outputs(self, logits: Tensor, rows: Examples) -> list[Output]:
        """Return one JSON-able output for each row, fillers too. For tasks whose loss and outputs
        both come of the logits of one pass.
        """
        raise NotImplementedError

    def predict(self, model: Model, batch: Batch, rows: Examples) -> list[Output]:
        """Return one JSON-able output for each row, fillers too; ``batch`` is on the model's
        device, gradients are off.

        ``model`` is an engine or a bare model in eval mode. All ranks call this equally often.
        """
        return self.outputs(self.logits(model, batch), rows)

    def judge(
        self, model: Model, batch: Batch, rows: Examples
    ) -> tuple[dict[str, Tensor], list[Output]]:
        """Return ``loss`` and ``predict`` of a batch, of one pass: for validation."""
        logits = self.logits(model, batch)
        return {self.term: self.row_losses(logits, batch)}, self.outputs(logits, rows)

    # ------------------------------------------------------------------------------ without a model
    def answer(self, example: Example, outputs: Sequence[Output]) -> Output:
        """Return the prediction for ``example``, ``{"prediction": ..., ...}``, from the outputs of
        its features in order.
        """
        return outputs[0]

    def measure(self, predictions: Sequence[Output], references: Sequence[Example]) -> Measure:
        """Return the metrics, of which there are also confidence intervals. Both have one entry an
        example, in the same order; pure.
        """
        raise NotImplementedError

    def score(
        self, predictions: Sequence[Output], references: Sequence[Example]
    ) -> dict[str, float]:
        """Return ``{name: score}``, so that predictions can be rescored from a file."""
        return self.measure(predictions, references).scores()

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Return with what an export shall carry along put into ``model.config``,
        ``model.generation_config`` and ``tokenizer``.
        """

    # -------------------------------------------------------------------------------------- helpers
    @property
    def pad_id(self) -> int:
        """The id that fills up: the tokenizer's, or what is masked anyway."""
        tokenizer = self.setting.tokenizer
        return next(
            (
                i
                for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
                if i is not None
            ),
            0,
        )

    def encode(self, text: str, pair: str | None = None) -> Feature:
        """Return one feature of a text or a pair, special tokens and all, cut to ``seq_len`` (the
        longer text first).

        Control tokens that a text spells are text; so they are wherever a task encodes one, with
        ``text_alone`` or ``Quoted``.
        """
        with text_alone(self.setting.tokenizer, text, pair):
            return self.cut(partial(self.setting.tokenizer, text, pair))

    def cut(self, encoded: Callable[..., BatchEncoding]) -> Feature:
        """Return what ``encoded(**how)`` gives, cut to ``seq_len``."""
        encoding, longest = encoded(), self.setting.seq_len
        truncated = len(encoding["input_ids"]) > longest
        if truncated:
            encoding = encoded(truncation=True, max_length=longest)
        return {**encoding, "truncated": truncated}

    def inputs(self, rows: Examples) -> dict[str, Tensor]:
        """Return what the tokenizer gave, padded; but no types of tokens for a model that knows
        none.
        """
        config = self.setting.model_config
        typed = config is None or bool(getattr(config, "type_vocab_size", 0))
        return {
            name: self.padded(rows, name)
            for name in rows.features[0]
            if name in MODEL_INPUTS and (typed or name != "token_type_ids")
        }

    def padded(self, rows: Examples, name: str) -> Tensor:
        """Return the lists under ``name`` as one int64 (B, T), filled up on the right: ids by the
        padding id, all else by 0.
        """
        return pad_rows(
            [row[name] for row in rows.features], self.pad_id if name == "input_ids" else 0
        )[0]

    def batch(
        self,
        rows: Examples,
        *,
        inputs: dict[str, Tensor],
        labels: Tensor,
        counts: dict[str, Tensor],
    ) -> Batch:
        """Return the batch, whose tokens are the rows' ``input_ids`` without padding; fillers count
        nothing.
        """
        return Batch(
            inputs=inputs,
            labels_BT=labels,
            input_ids=self.padded(rows, "input_ids"),
            source_B=rows.source_B,
            position_B=rows.position,
            counts={term: count_B * rows.valid_B for term, count_B in counts.items()},
            lengths_B=torch.tensor([len(row["input_ids"]) for row in rows.features]),
        )


def pad_rows(
    rows: Sequence[list[int]], pad_id: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ``(ids_BT, mask_BT)`` (int64): the rows with ``pad_id`` to the longest, and 0 in the
    mask where it stands.
    """
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side="left" if left else "right")
    return pad(ids, padding_value=pad_id), pad([torch.ones_like(row) for row in ids])


def check_text(role: str, value: object) -> None:
    """Refuse (BadExample) what is not text, or has nothing in it."""
    if value is not None and not isinstance(value, str):
        raise BadExample(f"the {role} is not text: {value!r:.60}")
    if not value or not value.strip():
        raise BadExample(f"the {role} is empty")


def number(role: str, value: Cell) -> float:
    """Return the number that ``value`` is, or says.

    Raises:
        BadExample: if it is none.
    """
    with suppress(TypeError, ValueError):
        if isfinite(finite := float(value)):
            return finite
    raise BadExample(f"the {role} {value!r:.60} is not a number")
