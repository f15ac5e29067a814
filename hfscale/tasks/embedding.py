"""Text embeddings from pairs that belong together, by the contrastive objective; judged by
similarity scores (STS) or retrieval.

    loss = - sum over i of log( exp(a_i . p_i / tau) / sum over candidates c of exp(a_i . c / tau) )
           / number of pairs

Candidates are all positives of the global batch, and all hard negatives where there are (Karpukhin
et al. 2020, DPR, sec. 3.2). Shape legend: B examples, V views of each (text, positive, negative), H
width, N examples of a data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hfscale.config.section import Section
from hfscale.metrics.correlation import correlation
from hfscale.metrics.measure import Measure, mean
from hfscale.models.pooling import Pooling
from hfscale.objectives.base import Batch, Forward, Model, Setting
from hfscale.objectives.contrastive import Contrastive, ContrastiveOptions, text_keys
from hfscale.stream.examples import BadExample, Examples, Facts
from hfscale.tasks.base import Example, Feature, Output, Task, check_text, number, pad_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

VIEWS = ("text", "positive", "negative")


class EmbeddingOptions(Section):
    """How a text becomes a vector, and how sharply vectors are compared."""

    temperature: Annotated[float, Field(gt=0)] = 0.05
    pooling: Pooling = "mean"


class Embedding(Task):
    """For any architecture of ``AutoModel``. A prediction is the unit vector of ``text``."""

    Options = EmbeddingOptions
    options: EmbeddingOptions
    auto_model = Contrastive.auto_model
    columns: ClassVar = {
        "text": "a text",
        "positive": "a text that belongs to it",
        "negative": "one that does not, but nearly",
        "score": "in place of that, for evaluation: how much the two belong together",
    }
    optional: ClassVar = frozenset({"negative", "score"})
    answers: ClassVar = frozenset({"positive"})
    metrics: ClassVar = frozenset({"accuracy", "recall_at_10", "mrr", "pearson", "spearman"})
    pipeline, code = "sentence-embedding", "hfscale.tasks.sentence_embedding"

    def __init__(self, options: Section, setting: Setting) -> None:
        super().__init__(options, setting)
        if setting.tokenizer:  # there is none where predictions are scored
            self.contrastive = Contrastive(ContrastiveOptions(**options.model_dump()), setting)

    @classmethod
    def facts_of_training(cls, options: Section, examples: Iterable[Example]) -> Facts:
        """Return how many examples repeat a text or a positive, which then are no negatives of each
        other.

        Raises:
            BadExample: for examples that cannot be compared with each other.
        """
        kinds, seen = set[tuple[bool, bool]](), {"text": set[int](), "positive": set[int]()}
        again = 0  # of examples: their text, or their positive, was there before
        for example in examples:
            kinds.add((example.get("negative") is not None, example.get("score") is not None))
            keys = {view: hash(str(example.get(view))) for view in seen}
            again += any(keys[view] in seen[view] for view in seen)
            for view, key in keys.items():
                seen[view].add(key)
        if any(scored for _, scored in kinds):
            raise BadExample(
                "pairs with a score are for evaluation: train on pairs that belong together"
            )
        if len(kinds) > 1:
            raise BadExample("some examples have a hard negative and others have none")
        return {"repeated": again} if again else {}

    @classmethod
    def question(cls, example: Example) -> object:
        """Return the text: what it is compared with, and how near it is, are the answer."""
        return {"text": example.get("text")}

    def weights(self) -> dict[str, float]:
        """Return ``contrastive`` (nats a text), and what is reported only."""
        return self.contrastive.weights()

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means as the contrastive objective reports them."""
        return self.contrastive.report(means)

    def forwards(
        self, model: Model, batches: Iterable[Batch], scales: Mapping[str, float]
    ) -> Iterator[Forward]:
        """Yield what the contrastive objective does, which compares all texts of the step."""
        return self.contrastive.forwards(model, batches, scales)

    def check(self, model: Model, *, device: torch.device | str) -> None:
        """Refuse what any task does, and a model whose vectors do not depend on the text."""
        super().check(model, device=device)
        self.contrastive.setting = self.setting  # which knows the live model by now
        self.contrastive.check(model, device=device)

    def files(self, config: PretrainedConfig) -> dict[str, str]:
        """Return what sentence-transformers reads of a folder."""
        return self.contrastive.files(config)

    def features(self, example: Example) -> list[Feature]:
        """Return the one feature: ``input_ids`` of the text, and the ids of what it is compared
        with.
        """
        views = [
            view
            for view in VIEWS
            if view in example and (view not in self.optional or example[view] is not None)
        ]
        for view in views:
            check_text(view, example[view])
        encodings = {view: self.encode(example[view]) for view in views}
        ids = {
            "input_ids" if view == "text" else view: encoded["input_ids"]
            for view, encoded in encodings.items()
        }
        return [{**ids, "truncated": any(encoded["truncated"] for encoded in encodings.values())}]

    def answered_features(self, example: Example) -> list[Feature]:
        """Return the one feature; a score is a number."""
        if example.get("score") is not None:
            number("score", example["score"])
        return self.features(example)

    def collate(self, rows: Examples) -> Batch:
        """Return the views (V * B, T), all texts first, then all positives."""
        views = [
            name for name in ("input_ids", *VIEWS[1:]) if all(name in row for row in rows.features)
        ]
        ids_BT, mask_BT = pad_rows(
            [row[name] for name in views for row in rows.features], self.pad_id
        )
        return self.batch(
            rows,
            inputs={"input_ids": ids_BT, "attention_mask": mask_BT},
            labels=torch.empty(len(rows.features), 0),
            counts=dict.fromkeys(self.weights(), torch.ones(len(rows.features), dtype=torch.int64)),
        )

    def predict(self, model: Model, batch: Batch, rows: Examples) -> list[Output]:
        """Return ``{"prediction": vector}`` a row, and the vector of the ``positive`` where there
        is one.
        """
        return _outputs(self.contrastive.embed(model, batch))

    def judge(
        self, model: Model, batch: Batch, rows: Examples
    ) -> tuple[dict[str, Tensor], list[Output]]:
        """Return the losses among the examples of this micro-batch on all ranks, and the vectors,
        of one pass.
        """
        z_VBH = self.contrastive.embed(model, batch)
        valid_B = batch.counts["contrastive"].to(z_VBH.device)
        return self.contrastive.compare(z_VBH, valid_B, text_keys(batch))[1], _outputs(z_VBH)

    def measure(self, predictions: Sequence[Output], references: Sequence[Example]) -> Measure:
        """Return ``pearson`` and ``spearman`` of the cosines with the scores; without scores
        ``accuracy``, ``recall_at_10``, ``mrr``.

        These are of finding a positive of an example's text among the distinct positives of all
        examples.
        """
        texts_NH, positives_NH = (
            np.array([p[name] for p in predictions]) for name in ("prediction", "positive")
        )
        if all(reference.get("score") is not None for reference in references):
            cosines_N = (texts_NH * positives_NH).sum(1)
            return correlation(
                cosines_N.tolist(), [float(reference["score"]) for reference in references]
            )
        first, column = list[int](), dict[object, int]()  # of each distinct positive
        right = dict[object, set[int]]()  # text -> its positives
        for n, reference in enumerate(references):
            answer = reference.get("positive", n)
            if answer not in column:
                column[answer] = len(first)
                first.append(n)
            right.setdefault(reference.get("text", n), set()).add(column[answer])
        candidates_CH = positives_NH[first]
        better = list[int]()
        for n, text_H in enumerate(texts_NH):
            cosines_C = candidates_CH @ text_H
            best = cosines_C[[*right[references[n].get("text", n)]]].max()
            better.append(int((cosines_C > best + 1e-6).sum()))
        better_N = np.array(better)
        values = {
            "accuracy": better_N < 1,
            "recall_at_10": better_N < 10,
            "mrr": 1 / (1 + better_N),
        }
        measured = mean(
            {name: value.tolist() for name, value in values.items()},
            proportions=["accuracy", "recall_at_10"],
        )
        if len(first) == len(references) == len(right):
            return measured
        note = (
            f"{len(right):,} texts and {len(first):,} positives differ; any positive of a "
            "text is right"
        )
        return replace(measured, notes={"repeated": note})

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Carry along the pooling, and the pipeline that does it."""
        tokenizer.model_max_length = self.setting.seq_len
        model.config.pooling = self.options.pooling
        model.config.custom_pipelines = {
            self.pipeline: {
                "impl": "sentence_embedding.SentenceEmbeddingPipeline",
                "pt": [self.auto_model],
            }
        }


def _outputs(z_VBH: Tensor) -> list[Output]:
    return [
        dict(zip(("prediction", "positive"), vectors, strict=False))
        for vectors in z_VBH.transpose(0, 1).tolist()
    ]
