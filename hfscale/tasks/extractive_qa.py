"""Extractive question answering: the answer is a span of the context, or none (SQuAD 1.1 and 2.0).

    loss = - sum over windows of (log softmax(start)_s + log softmax(end)_e) / 2
           / number of windows

A context too long for the model is read in overlapping windows. Where a window does not hold the
answer, (s, e) is its first token: "nothing here". An answer that no window holds whole teaches
nothing, and is counted; it is scored like any other. A span scores start + end; the answer is the
best of all windows, and it is none where the first token's score, the lowest of all windows,
exceeds it by more than a threshold. Padding is left out of the softmax, so how a batch is cut
changes nothing. Shape legend: B windows, T tokens. Sources: Devlin et al. 2019, BERT, sec. 4.2 and
4.3; the postprocessing of transformers' run_qa.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hfscale.config.section import Section
from hfscale.control_tokens import text_alone
from hfscale.errors import ConfigError
from hfscale.metrics.measure import Measure
from hfscale.metrics.squad import best_threshold, squad
from hfscale.models.call import call
from hfscale.objectives.base import Batch, Model, Setting
from hfscale.objectives.cross_entropy import IGNORE_INDEX, token_losses
from hfscale.stream.examples import BadExample, Cell, Examples, Facts
from hfscale.tasks.base import Example, Feature, Output, Task, check_text
from hfscale.tasks.question_answering import best_spans, choose, windows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NOTHING_HERE = [0, 0]  # the tokens at which "none" starts and ends
CUT = "no window holds the answer whole (data.max_length, task.options.stride)"
SHORTEST = 16  # tokens of a window: less leaves no room for a question, a context and their overlap


class QAOptions(Section):
    """How contexts are read, and when there is no answer."""

    stride: Annotated[int, Field(ge=0)] | None = (
        None  # tokens that two windows share; a third of data.max_length without it
    )
    max_answer_tokens: Annotated[int, Field(ge=1)] = 30
    n_best: Annotated[int, Field(ge=1)] = 20  # spans kept of an example
    no_answer: bool | None = None  # may there be none? without it: if so in the training examples
    no_answer_threshold: float = 0.0  # by how much "none" must beat the best span


class ExtractiveQA(Task):
    """For any architecture of ``AutoModelForQuestionAnswering``."""

    Options = QAOptions
    options: QAOptions
    term = "extractive_qa"
    auto_model = "AutoModelForQuestionAnswering"
    pipeline, code = "question-answering", "hfscale.tasks.question_answering"
    columns: ClassVar = {
        "question": "a question",
        "context": "the text that may hold its answer",
        "answers": 'a text, a list of texts or {"text": [...], "answer_start": [...]}; empty: '
        "there is none",
        "answer_start": "at which character of the context it begins (or each); without it, "
        "where it first occurs",
    }
    optional: ClassVar = frozenset({"answer_start"})
    answers: ClassVar = frozenset({"answers"})
    metrics: ClassVar = frozenset(
        {
            "exact_match",
            "f1",
            "has_answer_exact_match",
            "has_answer_f1",
            "no_answer_accuracy",
            "best_f1",
            "best_f1_threshold",
        }
    )

    def __init__(self, options: Section, setting: Setting) -> None:
        super().__init__(options, setting)
        if setting.seq_len < SHORTEST:
            raise ConfigError(
                "windows are too short for a question and a context",
                where="data.max_length",
                value=setting.seq_len,
                remedy=f"give at least {SHORTEST}; 384 is usual",
            )

    @classmethod
    def facts(cls, options: Section, examples: Iterable[Example]) -> Facts:
        """Return whether some questions have no answer."""
        answered = set[bool]()
        for example in examples:
            with suppress(BadExample):  # ``features`` says which
                answered.add(bool(_answers(example)))
        if answered == {False}:
            raise BadExample(
                "no example has an answer: is the column of the answers the right one?"
            )
        return {"no_answer": False in answered}

    @classmethod
    def known(cls, config: PretrainedConfig) -> Facts:
        """Return what a model of ours says; of others' models, that there always is an answer."""
        return {"no_answer": getattr(config, "question_answering", {}).get("no_answer", False)}

    @classmethod
    def question(cls, example: Example) -> object:
        """Return question and context: where the answer begins is a part of the answer."""
        return {role: example.get(role) for role in ("question", "context")}

    @property
    def no_answer(self) -> bool:
        """Whether the answer may be that there is none."""
        return (
            self.options.no_answer
            if self.options.no_answer is not None
            else bool(self.setting.facts.get("no_answer"))
        )

    @property
    def how(self) -> dict[str, object]:
        """What answers depend on, beside the model."""
        return {
            **self.options.model_dump(),
            "no_answer": self.no_answer,
            "max_length": self.setting.seq_len,
        }

    def model_overrides(self) -> dict[str, object]:
        """Return two scores a token, and the padding id."""
        return {"num_labels": 2, "pad_token_id": self.pad_id}

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Carry along how answers are found, and the pipeline that transformers 5 dropped."""
        model.config.question_answering = self.how
        model.config.custom_pipelines = {
            self.pipeline: {
                "impl": "question_answering.QuestionAnsweringPipeline",
                "pt": [self.auto_model],
            }
        }

    def features(self, example: Example) -> list[Feature]:
        """Return the windows: ``input_ids``, ..., each token's place in the context (-1: it is not
        of it), and ``labels`` (start, end).
        """
        asked: dict[str, Cell] = {role: example.get(role) for role in ("question", "context")}
        for role, text in asked.items():
            check_text(role, text)
        span = self._span(example) if "answers" in example else None
        with text_alone(self.setting.tokenizer, *asked.values()):
            parts = windows(self.setting.tokenizer, self.how, **asked)
        if not parts:
            raise BadExample("the tokenizer makes nothing of the context")
        if span is None:
            return parts
        labels = [_label(window, *span) for window in parts]
        if span[0] >= 0 and max(labels) == NOTHING_HERE:
            # "none" would be the wrong lesson: the answer is there, in two windows
            return [{**window, "labels": [IGNORE_INDEX] * 2, "unlearnt": CUT} for window in parts]
        return [{**window, "labels": label} for window, label in zip(parts, labels, strict=True)]

    def _span(self, example: Example) -> tuple[int, int]:
        """Return the characters of the first answer that is in the context where it should be, else
        anywhere; (-1, -1) for no answer.
        """
        answers, context = _answers(example), example["context"]
        for text, start in answers:
            if context[start : start + len(text)] == text or (start := context.find(text)) >= 0:
                return start, start + len(text)
        if answers:
            raise BadExample(f"the answer {answers[0][0]!r:.60} is not in its context")
        return -1, -1

    def collate(self, rows: Examples) -> Batch:
        """Return the padded windows, and labels (B, 2): the tokens at which the answer starts and
        ends.
        """
        labels = torch.tensor([row.get("labels", [IGNORE_INDEX] * 2) for row in rows.features])
        counts = {self.term: (labels[:, 0] != IGNORE_INDEX).long()}
        return self.batch(rows, inputs=self.inputs(rows), labels=labels, counts=counts)

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """Return the scores of start and end, (B, 2, T) in fp32, -inf at padding."""
        output = call(model, **batch.inputs)
        assert batch.lengths_B is not None
        padding_BT = torch.arange(batch.input_ids.shape[1]) >= batch.lengths_B[:, None]
        logits_B2T = torch.stack([output.start_logits, output.end_logits], 1).float()
        return logits_B2T.masked_fill(padding_BT[:, None].to(logits_B2T.device), float("-inf"))

    def row_losses(self, logits_B2T: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of start and end."""
        return token_losses(logits_B2T, batch.labels_BT).mean(1) * batch.counts[self.term].to(
            logits_B2T.device
        )

    def outputs(self, logits_B2T: Tensor, rows: Examples) -> list[Output]:
        """Return for each window its best ``spans`` (score, first and one past the last character)
        and the score of ``none``.
        """
        return [
            best_spans(start_T, end_T, window=row, how=self.how)
            for (start_T, end_T), row in zip(logits_B2T.cpu(), rows.features, strict=True)
        ]

    def answer(self, example: Example, outputs: Sequence[Output]) -> Output:
        """Return what ``choose`` does: ``prediction``, ``start``, ``end``, ``score``,
        ``no_answer_score``, ``n_best``.
        """
        return choose(example["context"], outputs, how=self.how)

    def measure(self, predictions: Sequence[Output], references: Sequence[Example]) -> Measure:
        """Return SQuAD's exact match and F1 at the threshold of the options, by kind of question
        where there are both.
        """
        texts, true, scores = _compared(predictions, references)
        return squad(
            texts,
            true,
            no_answer=scores if self.no_answer else None,
            threshold=self.options.no_answer_threshold,
        )

    def score(
        self, predictions: Sequence[Output], references: Sequence[Example]
    ) -> dict[str, float]:
        """Return the scores of ``measure``, and the threshold that would have given the best F1."""
        best = best_threshold(*_compared(predictions, references)) if self.no_answer else {}
        return self.measure(predictions, references).scores() | best


def _compared(
    predictions: Sequence[Output], references: Sequence[Example]
) -> tuple[list[str], list[list[str]], list[float]]:
    """Return the best spans, the true answers, and how much "none" beats each span. Those of
    others, or mended ones, count as they are.
    """
    spans = [
        p["n_best"][0]["text"] if p.get("n_best") and not p["prediction"] else p["prediction"]
        for p in predictions
    ]
    none = [p.get("no_answer_score", -1.0 if p["prediction"] else 1.0) for p in predictions]
    return spans, [[text for text, _ in _answers(example)] for example in references], none


def _answers(example: Example) -> list[tuple[str, int]]:
    """Return the answers with where they should begin (-1: not said), of any of the forms that data
    sets have.
    """
    texts: Cell = example["answers"]
    starts = example.get("answer_start")
    try:
        if isinstance(texts, dict):
            texts, starts = texts["text"], texts.get("answer_start")
        texts = [texts] if isinstance(texts, str) else list(texts or [])
        if texts and isinstance(texts[0], dict):  # as in SQuAD's own file
            texts, starts = (
                [answer["text"] for answer in texts],
                [answer.get("answer_start") for answer in texts],
            )
        starts = starts if isinstance(starts, list) else [starts] * len(texts)
        return [
            (text, -1 if start in (None, "") else int(start))
            for text, start in zip(texts, starts, strict=True)
            if text.strip()
        ]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise BadExample(
            "the answers are neither texts nor as in SQuAD, with as many places: "
            f"{example['answers']!r:.60}"
        ) from None


def _label(window: Feature, start: int, end: int) -> list[int]:
    """Return the first and last token of the characters from ``start`` to ``end``; the first of all
    where the window does not hold them.
    """
    begins, ends = window["begins"], window["ends"]
    own = [n for n, begin in enumerate(begins) if begin >= 0]
    if start < 0 or begins[own[0]] > start or ends[own[-1]] < end:
        return NOTHING_HERE
    return [next(n for n in own if ends[n] > start), max(n for n in own if begins[n] < end)]
