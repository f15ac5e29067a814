"""Sequence classification: one label, several, or a number for a text or a pair of texts. Sentiment
analysis is the first example.

    single label   loss = - sum over examples of w_y log softmax(z)_y  /  number of examples
    multi-label    loss =   sum over examples and labels of binary cross-entropy(z_c, y_c)
                            / (number of examples * C)
    regression     loss =   sum over examples of (z - y)^2  /  number of examples

With ``class_weights: balanced`` w_c = N / (C * N_c) over the training examples, whose mean is 1, so
the divisor stays their number. Label smoothing e gives the true class 1 - e + e / C and every other
e / C (Szegedy et al. 2016, sec. 7). Shape legend: B examples, T tokens, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hfscale.config.section import Section
from hfscale.errors import nearest
from hfscale.metrics.classification import classification
from hfscale.metrics.correlation import correlation
from hfscale.metrics.measure import Measure, mean
from hfscale.objectives.base import Batch
from hfscale.stream.examples import BadExample, Cell, Examples, Facts
from hfscale.tasks.base import Example, Feature, Output, Task, check_text, number
from hfscale.tasks.labels import Labels, all_labels, known_labels, label_name, named, names_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# transformers' names
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


class ClassificationOptions(Section):
    """What is asked of a text. Without ``problem`` the labels say it: lists are several labels,
    fractions are regression.
    """

    problem: Problem | None = None
    labels: Labels | None = (
        None  # the whole set, in its order; without it, those of the training examples
    )
    separator: Annotated[str, Field(min_length=1)] | None = (
        None  # several labels as one text, in csv: what stands between them
    )
    class_weights: Literal["none", "balanced"] = "none"  # of a single label
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # of a single label
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = (
        0.5  # of several labels: the least probability
    )


class SequenceClassification(Task):
    """For any architecture of ``AutoModelForSequenceClassification``."""

    Options = ClassificationOptions
    options: ClassificationOptions
    term = "classification"
    auto_model = "AutoModelForSequenceClassification"
    pipeline = "text-classification"
    columns: ClassVar = {
        "text": "a text",
        "pair": "a second text, which belongs to it",
        "label": "a label, a list of them, or a number",
    }
    optional: ClassVar = frozenset({"pair"})
    answers: ClassVar = frozenset({"label"})
    metrics: ClassVar = frozenset(
        {"accuracy", "f1", "f1_macro", "f1_micro", "mcc", "pearson", "spearman", "mse"}
    )

    @classmethod
    def facts(cls, options: Section, examples: Iterable[Example]) -> Facts:
        """Return the problem, and the labels with how often each occurs."""
        assert isinstance(options, ClassificationOptions)
        values = [
            _split(example["label"], options)
            for example in examples
            if example.get("label") not in (None, "")
        ]
        _check_vectors(values, options.labels)
        kinds = {_kind(v) for v in values}
        problem = options.problem or (
            "multi_label_classification"
            if "list" in kinds
            else "regression"
            if "fraction" in kinds and "label" not in kinds
            else "single_label_classification"
        )
        if problem == "regression":
            return {"problem": problem}
        labels = options.labels or all_labels(values)
        read = partial(_names, labels=labels, numbered=labels)
        if len(labels) < 2 and problem == "single_label_classification":
            raise BadExample(
                f"all examples have one label, {labels[0]}: there is nothing to tell apart"
                if labels
                else "no example has a label"
            )
        counts = Counter(chain.from_iterable(map(read, values)))
        return {"problem": problem, "labels": labels, "counts": [counts[label] for label in labels]}

    @classmethod
    def known(cls, config: PretrainedConfig) -> Facts:
        """Return problem and labels of a classifier that anybody made."""
        problem = config.problem_type or (
            "regression" if config.num_labels == 1 else "single_label_classification"
        )
        return {"problem": problem, "labels": names_of(config)}

    @property
    def problem(self) -> str:
        return self.setting.facts["problem"]

    @property
    def labels(self) -> list[str]:
        """The labels in the model's order; ``task.options.labels`` say in which order the data
        count them.
        """
        return known_labels(self.setting.facts.get("labels", []), self.options.labels)

    def names(self, value: object) -> list[str]:
        """Return the names of the label, or of the labels, that a cell of the data says."""
        return _names(value, labels=self.labels, numbered=self.options.labels or self.labels)

    def model_overrides(self) -> dict[str, object]:
        """Return the labels and the kind of problem; and the padding id, by which decoders find the
        last token.
        """
        labels = self.labels or ["LABEL_0"]
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: n for n, label in enumerate(labels)},
            "problem_type": self.problem,
            "pad_token_id": self.pad_id,
        }

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Carry along where texts are cut, for ``pipe(text, truncation=True)``."""
        tokenizer.model_max_length = self.setting.seq_len

    def features(self, example: Example) -> list[Feature]:
        """Return the one feature; its ``labels`` is a class's number, a list of C zeros and ones,
        or a number.
        """
        text, pair = example["text"], example.get("pair")
        check_text("text", text)
        if pair:
            check_text("pair", pair)
        feature = self.encode(text, pair or None)
        if "label" in example:
            feature["labels"] = self._target(_split(example["label"], self.options))
        return [feature]

    def _target(self, value: object) -> float | int | list[float]:
        if value in (None, "") and self.problem != "regression":
            raise BadExample("there is no label")
        if self.problem == "regression":
            return number("label", value)
        several = self.problem == "multi_label_classification"
        if isinstance(value, list) and not several:
            raise BadExample(f"the label {value!r:.60} is a list, where others have one")
        for name in (names := self.names(value)):
            if name not in self.labels:
                raise BadExample(
                    f"the label {name!r:.60} is not in the set; {nearest(name, self.labels)}"
                )
        return (
            [float(label in names) for label in self.labels]
            if several
            else self.labels.index(names[0])
        )

    def collate(self, rows: Examples) -> Batch:
        """Return the padded texts and their labels (B,) or (B, C)."""
        asked_B = torch.tensor(["labels" in row for row in rows.features]).long()
        labels = (
            torch.tensor([row["labels"] for row in rows.features])
            if asked_B.all()
            else torch.empty(0)
        )
        return self.batch(
            rows, inputs=self.inputs(rows), labels=labels, counts={self.term: asked_B}
        )

    def row_losses(self, logits_BC: Tensor, batch: Batch) -> Tensor:
        """Return each row's loss; smoothed and weighted while training, plain where it is told or
        compared.
        """
        learning = torch.is_grad_enabled()
        logits_BC, valid_B = logits_BC.float(), batch.counts[self.term].to(logits_BC.device)
        if self.problem == "regression":
            return (logits_BC.squeeze(1) - batch.labels_BT).square() * valid_B
        if self.problem == "multi_label_classification":
            return (
                F.binary_cross_entropy_with_logits(
                    logits_BC, batch.labels_BT, reduction="none"
                ).mean(1)
                * valid_B
            )
        losses_B = F.cross_entropy(
            logits_BC,
            batch.labels_BT,
            reduction="none",
            label_smoothing=self.options.label_smoothing if learning else 0.0,
        )
        counts = self.setting.facts.get("counts")
        if learning and self.options.class_weights == "balanced" and counts:
            weights_C = torch.tensor(
                [sum(counts) / (len(counts) * max(1, n)) for n in counts], device=logits_BC.device
            )
            losses_B = losses_B * weights_C[batch.labels_BT]
        return losses_B * valid_B

    def outputs(self, logits_BC: Tensor, rows: Examples) -> list[Output]:
        """Return label and probabilities a row; of several labels, those above the threshold; of a
        regression, the number.
        """
        logits_BC = logits_BC.float()
        if self.problem == "regression":
            return [{"prediction": value} for value in logits_BC.squeeze(1).tolist()]
        several = self.problem == "multi_label_classification"
        probabilities = (logits_BC.sigmoid() if several else logits_BC.softmax(-1)).tolist()
        scored = [dict(zip(self.labels, row, strict=True)) for row in probabilities]
        if several:
            return [
                {
                    "prediction": [
                        label for label, p in row.items() if p >= self.options.threshold
                    ],
                    "scores": row,
                }
                for row in scored
            ]
        return [{"prediction": max(row, key=row.__getitem__), "scores": row} for row in scored]

    def measure(self, predictions: Sequence[Output], references: Sequence[Example]) -> Measure:
        """Return accuracy, F1 and MCC (``metrics/classification.py``); of a regression correlations
        and the mean squared error.
        """
        true = [_split(reference["label"], self.options) for reference in references]
        if lacking := [
            reference["id"]
            for reference, label in zip(references, true, strict=True)
            if label in (None, "")
        ]:
            raise BadExample(f"there is no label: {', '.join(lacking[:3])}")
        got = [prediction["prediction"] for prediction in predictions]
        if self.problem == "regression":
            numbers = list(map(float, true))
            return correlation(got, numbers) | mean(
                {"mse": [(a - b) ** 2 for a, b in zip(got, numbers, strict=True)]}
            )
        numbers = [value for value in true if _is_number(value, self.labels)]
        names = [self.names(value) for value in true]
        if self.problem == "multi_label_classification":
            true, got = names, [[named(label, self.labels) for label in labels] for labels in got]
            predicted = list(chain.from_iterable(got))
        else:
            true, got = [name for (name,) in names], [named(label, self.labels) for label in got]
            predicted = got
        measured, notes = classification(got, true, labels=self.labels), dict[str, str]()
        if unknown := [label for label in predicted if label not in self.labels]:
            such_as = f"such as {unknown[0]!r:.60}: none of {', '.join(self.labels):.200}"
            notes["unknown labels"] = f"{len(unknown):,}, {such_as}"
        if numbers and not self.options.labels:
            order = ", ".join(f"{n} is {label}" for n, label in enumerate(self.labels))
            notes["numbered labels"] = (
                f"{order:.200}: the model's order; where the data count otherwise, say "
                "task.options.labels"
            )
        if "f1" in measured.scores():
            notes["f1"] = f"of {self.labels[1]!r}, the second label"
        return replace(measured, notes=notes) if notes else measured


def _split(value: Cell, options: ClassificationOptions) -> Cell:
    if options.separator is not None and isinstance(value, str):
        return [part.strip() for part in value.split(options.separator) if part.strip()]
    return value


def _names(value: object, *, labels: Sequence[str], numbered: Sequence[str]) -> list[str]:
    """Return the names that a cell says; ``numbered`` is the order in which numbers count, and
    zeros and ones stand for each.
    """
    if isinstance(value, list) and len(value) == len(numbered) and _is_vector(value, labels):
        return [label for label, member in zip(numbered, value, strict=True) if float(member)]
    return [named(label, numbered) for label in (value if isinstance(value, list) else [value])]


def _is_number(value: object, labels: Sequence[str]) -> bool:
    """Return whether a cell says labels by numbers that are no names among ``labels``."""
    members = value if isinstance(value, list) else [value]
    return any(named(label, labels) not in (label_name(label), str(label)) for label in members)


def _is_vector(value: Sequence[object], labels: Sequence[str] = ()) -> bool:
    """Return whether a list has a zero or a one for each label: it cannot be a list of labels that
    are named so.
    """
    return len(value) > 1 and all(
        isinstance(member, bool)
        or (label_name(member) in ("0", "1") and label_name(member) not in labels)
        for member in value
    )


def _check_vectors(values: Sequence[object], labels: list[str] | None) -> None:
    """Refuse (BadExample) lists of one length with numbers for each label, unless the labels have
    names.
    """
    lists = [value for value in values if isinstance(value, list)]
    lengths = {len(value) for value in lists}
    if len(lists) < len(values) or len(lengths) != 1 or min(lengths) < 2:
        return
    (n,) = lengths
    if any(_kind(member) == "fraction" for value in lists for member in value):
        raise BadExample(
            f"the labels are lists of {n} fractions, such as {lists[0]!r:.60}: these are no "
            "labels; give those that hold"
        )
    if all(_is_vector(value, labels or ()) for value in lists) and len(labels or ()) != n:
        raise BadExample(
            f"the labels are lists of {n} zeros and ones, such as {lists[0]!r:.60}: name the "
            f"{n} labels in their order as task.options.labels"
        )


def _kind(value: Cell) -> str:
    """Return list, fraction (it can only be a number to predict: 2.5, or "2.5" in csv), whole (a
    number, or a label) or label.
    """
    if isinstance(value, list):
        return "list"
    try:
        amount = float(value)
    except (TypeError, ValueError):
        return "label"
    if isinstance(value, str) and not isfinite(amount):
        return "label"
    return "whole" if amount.is_integer() or not isfinite(amount) else "fraction"  # NaN is a gap
