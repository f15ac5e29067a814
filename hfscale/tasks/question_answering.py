"""Windows of a context, the choice of an answer among their spans, and the pipeline for it, which
transformers 5 dropped.

A copy of this file goes along with exports, so it knows torch and transformers alone:
``pipeline("question-answering", FOLDER, trust_remote_code=True)(question=..., context=...)``.
``how`` holds the options of the task, ``max_length`` and ``no_answer``; an export has it in its
config. Shape legend: W windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

import torch
from transformers import Pipeline, PreTrainedModel, PreTrainedTokenizerBase

# "input_ids" and so on, and "begins", "ends" of each token
Window = dict[str, Any]
# the best answers in a window: "spans", and the score of "none"
Spans = dict[str, Any]
# the options of the task, "max_length" and "no_answer"
How = dict[str, Any]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def windows(
    tokenizer: PreTrainedTokenizerBase, how: How, *, question: str, context: str
) -> list[Window]:
    """Return the windows: what the tokenizer gives, and where each token ``begins`` and ``ends`` in
    the context (-1: it is not of it, or nothing but white space, which answers nothing).

    A question longer than half a window is cut, and all are ``truncated``. None is returned where
    the context has no token.
    """
    max_length, stride = how["max_length"], how["stride"]
    asked = tokenizer(
        question,
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=True,
    )["offset_mapping"]
    truncated = len(asked) > max_length // 2
    if truncated:
        question, asked = question[: asked[max_length // 2 - 1][1]], asked[: max_length // 2]
    # not by the tokenizer's own overflow: some versions of tokenizers lose what overflows
    encoding = tokenizer(
        question,
        context,
        truncation=False,
        return_offsets_mapping=True,
        split_special_tokens=True,  # text that spells a control token is text
        verbose=False,
    )
    sides, offsets = encoding.sequence_ids(0), encoding["offset_mapping"]
    own = [n for n, side in enumerate(sides) if side == 1]
    if not own:
        return []
    first, last = own[0], own[-1] + 1
    room = max(1, max_length - first - (len(sides) - last))
    chunks = []
    for part in parts(len(own), room=room, stride=max_length // 3 if stride is None else stride):
        tokens = [*range(first), *(first + n for n in part), *range(last, len(sides))]
        places = [(-1, -1)] * len(tokens)
        for place, n in enumerate(tokens):
            if sides[n] == 1 and context[slice(*offsets[n])].strip():
                places[place] = offsets[n]
        inputs = {name: [encoding[name][n] for n in tokens] for name in INPUTS if name in encoding}
        begins, ends = (list(side) for side in zip(*places, strict=True))
        chunks.append({**inputs, "truncated": truncated, "begins": begins, "ends": ends})
    return [window for window in chunks if max(window["begins"]) >= 0]


def parts(tokens: int, *, room: int, stride: int) -> list[range]:
    """Return which of so many ``tokens`` each window holds: at most ``room``, ``stride`` of them
    shared, half of them at most.
    """
    stride = min(stride, room // 2)
    starts = range(0, max(1, tokens - stride), room - stride)
    return [range(start, min(start + room, tokens)) for start in starts]


def best_spans(start_T: torch.Tensor, end_T: torch.Tensor, *, window: Window, how: How) -> Spans:
    """Return the best ``spans`` of a window (score, first and one past the last character), and the
    score of ``none``, the first token.
    """
    begins, ends = window["begins"], window["ends"]
    own = [n for n, begin in enumerate(begins) if begin >= 0]
    # of the spans from each token of the context to each
    scores = start_T[own, None] + end_T[None, own]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(how["max_answer_tokens"] - 1)
    best = (
        scores.masked_fill(~allowed, float("-inf"))
        .flatten()
        .topk(min(how["n_best"], int(allowed.sum())))
    )
    spans = [
        (score, begins[own[place // len(own)]], ends[own[place % len(own)]])
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return {"none": float(start_T[0] + end_T[0]), "spans": spans}


def choose(context: str, found: Sequence[Spans], *, how: How) -> Spans:
    """Return the ``prediction`` ("" for none) with ``start``, ``end`` and ``score``, and the
    ``n_best`` spans of all windows.

    ``no_answer_score`` is what the threshold is for: by how much "none" beats the best span.
    """
    none = min(window["none"] for window in found)
    scores: dict[tuple[int, int], float] = {}  # overlapping windows find the same span
    for score, begin, end in (span for window in found for span in window["spans"]):
        text = context[begin:end]
        # some tokenizers' tokens hold the space before
        place = (
            begin + len(text) - len(text.lstrip()),
            begin + len(text.rstrip()),
        )
        scores[place] = max(scores.get(place, score), score)
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[: how["n_best"]]
    top = best[0][1]
    silence = exp(min(none - top, 700.0)) if how["no_answer"] else 0.0
    total = sum(exp(score - top) for _, score in best) + silence
    spans = [
        {"text": context[begin:end], "start": begin, "end": end, "score": exp(score - top) / total}
        for (begin, end), score in best
    ]
    silent = how["no_answer"] and none - top > how["no_answer_threshold"]
    chosen: dict[str, object] = (
        {"text": "", "start": None, "end": None, "score": silence / total} if silent else spans[0]
    )
    return {
        "prediction": chosen["text"],
        **{name: chosen[name] for name in ("start", "end", "score")},
        "no_answer_score": none - top,
        "n_best": spans,
    }


class QuestionAnsweringPipeline(Pipeline):
    """``pipe(question=..., context=...)``, or a list of ``{"question", "context"}``: ``{"answer",
    "start", "end", "score"}`` each.
    """

    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = True  # type: ignore[assignment]
    model: PreTrainedModel

    def __call__(self, inputs: object = None, *_: object, **asked: object) -> object:
        """Return the answer, with its place in the context."""
        given = asked if inputs is None else inputs
        return super().__call__(given)  # type: ignore[no-untyped-call]

    def _sanitize_parameters(
        self, **_: object
    ) -> tuple[dict[str, object], dict[str, object], dict[str, object]]:
        return {}, {}, {}

    def preprocess(self, input_: dict[str, str], **_: object) -> Window:
        assert self.tokenizer is not None
        chunks = windows(self.tokenizer, self.model.config.question_answering, **input_)
        rows = {
            name: [torch.tensor(window[name]) for window in chunks]
            for name in INPUTS
            if name in chunks[0]
        }
        inputs = {
            name: torch.nn.utils.rnn.pad_sequence(row, batch_first=True)
            for name, row in rows.items()
        }
        return {"context": input_["context"], "windows": chunks, "inputs": inputs}

    def _forward(self, input_tensors: Window, **_: object) -> Any:
        output = self.model(**input_tensors.pop("inputs"))
        return {**input_tensors, "start_WT": output.start_logits, "end_WT": output.end_logits}

    def postprocess(self, model_outputs: Window, **_: object) -> dict[str, object]:
        how = self.model.config.question_answering
        parts = zip(
            model_outputs["start_WT"].float(),
            model_outputs["end_WT"].float(),
            model_outputs["windows"],
            strict=True,
        )
        answer = choose(
            model_outputs["context"],
            [best_spans(start, end, window=window, how=how) for start, end, window in parts],
            how=how,
        )
        return {
            "answer": answer["prediction"],
            **{name: answer[name] for name in ("start", "end", "score")},
        }
