"""Token classification: one tag a word, as in named-entity recognition (NER).

    loss = - sum over words of log softmax(z of the word's first token)_tag  /  number of words

A sentence is words with a tag each: ``O``, ``B-PER``, ``I-PER``, ... in any of the usual schemes,
or any other set. For prediction it may be a text, which is cut into words: runs of letters and
digits, single characters of scripts without spaces, single marks. Each word is tokenized with the
space before it, as in running text. Long sentences are read in overlapping windows, and every word
is judged once, where it has most context. Shape legend: B windows, T tokens, C tags. Source: Devlin
et al. 2019, BERT, sec. 5.3 (the first piece of a word stands for it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hfscale.config.section import Section
from hfscale.control_tokens import text_alone
from hfscale.errors import DataError, nearest
from hfscale.metrics.entities import OUTSIDE, entities, entity_f1, parts_entities, tag_accuracy
from hfscale.metrics.measure import Measure
from hfscale.metrics.rouge import UNSPACED, WORD
from hfscale.objectives.base import Batch
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.stream.examples import BadExample, Examples, Facts
from hfscale.tasks.base import MODEL_INPUTS, Example, Feature, Output, Task
from hfscale.tasks.labels import Labels, all_labels, known_labels, named, names_of
from hfscale.tasks.question_answering import parts

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class TokenOptions(Section):
    """The whole set of tags, in its order; without it, those of the training examples. Numbers in
    the data count from 0 in it.
    """

    labels: Labels | None = None


class TokenClassification(Task):
    """For any architecture of ``AutoModelForTokenClassification``."""

    Options = TokenOptions
    options: TokenOptions
    term = "token_classification"
    auto_model = "AutoModelForTokenClassification"
    pipeline = "token-classification"
    columns: ClassVar = {
        "text": "a text, where there are no words",
        "words": "a list of words, or words with spaces between them",
        "tags": "as many tags",
    }
    optional: ClassVar = frozenset({"words", "text"})
    answers: ClassVar = frozenset({"tags"})
    metrics: ClassVar = frozenset({"f1", "precision", "recall", "f1_macro", "accuracy"})

    @classmethod
    def facts(cls, options: Section, examples: Iterable[Example]) -> Facts:
        """Return the tags, ``O`` first."""
        assert isinstance(options, TokenOptions)
        given = (example.get("tags") for example in examples)
        tags = (
            all_labels(_listed(one) for one in given if isinstance(one, (str, list)))
            if not options.labels
            else []
        )
        if tags and all(label.isdigit() for label in tags):
            raise BadExample(
                f"tags are numbers ({', '.join(tags[:5])}, ...): give their names in order as "
                "task.options.labels"
            )
        labels = options.labels or sorted(tags, key=lambda label: label != OUTSIDE)
        try:
            parts_entities(labels)
        except DataError as error:
            raise BadExample(f"{error.what}: {error.value}; {error.remedy}") from None
        return {"labels": labels}

    @classmethod
    def known(cls, config: PretrainedConfig) -> Facts:
        """Return the tags of a model that anybody made."""
        return {"labels": names_of(config)}

    @property
    def labels(self) -> list[str]:
        return known_labels(self.setting.facts["labels"], self.options.labels)

    def model_overrides(self) -> dict[str, object]:
        """Return the tags, and the padding id."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: n for n, label in enumerate(self.labels)},
            "pad_token_id": self.pad_id,
        }

    def features(self, example: Example) -> list[Feature]:
        """Return the windows: ``input_ids``, ..., which ``words`` each judges, at which
        ``positions``, and their ``labels``.
        """
        words, spaced, _ = _words(example)
        targets = self._targets(example, len(words)) if "tags" in example else None
        length = self.setting.seq_len
        spelled = [" " * space + word for word, space in zip(words, spaced, strict=True)]
        with text_alone(self.setting.tokenizer, *spelled):
            encoding = self.setting.tokenizer(
                spelled, is_split_into_words=True, truncation=False, verbose=False
            )
        of = encoding.word_ids(0)
        own = [n for n, word in enumerate(of) if word is not None]
        if not own:
            raise BadExample("there are no words: neither in words nor in text")
        first, last = own[0], own[-1] + 1
        room = max(1, length - first - (len(of) - last))
        windows = [
            [*range(first), *(first + n for n in part), *range(last, len(of))]
            for part in parts(len(own), room=room, stride=length // 4)
        ]
        begins = {of[n]: n for n in reversed(own)}  # of each word its first token
        best: dict[
            int, tuple[int, int, int]
        ] = {}  # word -> tokens to the nearer end of the window, window, position
        for window, tokens in enumerate(windows):
            for position, n in enumerate(tokens):
                if begins.get(word := of[n]) == n:
                    near = min(position, len(tokens) - position)
                    best[word] = max(best.get(word, (-1, 0, 0)), (near, window, position))
        features = []
        # one may be left without a word of its own
        for window in sorted({window for _, window, _ in best.values()}):
            judged = {word: at for word, (_, place, at) in best.items() if place == window}
            feature = {
                name: [encoding[name][n] for n in windows[window]]
                for name in MODEL_INPUTS
                if name in encoding
            }
            feature |= {"words": list(judged), "positions": list(judged.values())}
            features.append(
                feature
                if targets is None
                else {**feature, "labels": [targets[word] for word in judged]}
            )
        return features

    def _targets(self, example: Example, words: int) -> list[int]:
        numbered = self.options.labels or self.labels  # how the data count them
        tags = [named(tag, numbered) for tag in _listed(example["tags"])]
        if len(tags) != words:
            raise BadExample(f"there are {words} words and {len(tags)} tags")
        if unknown := set(tags) - {*self.labels}:
            raise BadExample(
                f"the tag {min(unknown)!r:.60} is not in the set; "
                f"{nearest(min(unknown), self.labels)}"
            )
        return [self.labels.index(tag) for tag in tags]

    def collate(self, rows: Examples) -> Batch:
        """Return the padded windows; labels_BT stand at the first token of each judged word."""
        inputs = self.inputs(rows)
        labels_BT = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        for labels_T, row, valid in zip(
            labels_BT, rows.features, rows.valid_B.tolist(), strict=True
        ):
            if valid and "labels" in row:
                labels_T[row["positions"]] = torch.tensor(row["labels"])
        return self.batch(
            rows,
            inputs=inputs,
            labels=labels_BT,
            counts={self.term: (labels_BT != IGNORE_INDEX).sum(1)},
        )

    def outputs(self, logits_BTC: Tensor, rows: Examples) -> list[Output]:
        """Return for each window its words' numbers, tags and probabilities."""
        scores_BT, tags_BT = (part.cpu() for part in logits_BTC.float().softmax(-1).max(-1))
        return [
            {
                "words": row["words"],
                "tags": [self.labels[n] for n in tags_BT[b, row["positions"]].tolist()],
                "scores": scores_BT[b, row["positions"]].tolist(),
            }
            for b, row in enumerate(rows.features)
        ]

    def answer(self, example: Example, outputs: Sequence[Output]) -> Output:
        """Return the ``prediction``, a tag a word; of a text also its ``words``, and of tags that
        part entities these, with their places in it.
        """
        words, _, places = _words(example)
        # also of a word that the tokenizer gives no token
        tags = [OUTSIDE] * len(words)
        scores = [1.0] * len(words)
        for output in outputs:
            for word, tag, score in zip(
                output["words"], output["tags"], output["scores"], strict=True
            ):
                tags[word], scores[word] = tag, score
        if not places:
            return {"prediction": tags}
        answer: Output = {"prediction": tags, "words": words}
        if not self._entities:
            return answer
        ends = [place + len(word) for place, word in zip(places, words, strict=True)]
        return answer | {
            "entities": [
                {
                    "type": kind,
                    "text": example["text"][places[first] : ends[last - 1]],
                    "start": places[first],
                    "end": ends[last - 1],
                    "score": sum(scores[first:last]) / (last - first),
                }
                for kind, first, last in entities(tags)
            ]
        }

    @property
    def _entities(self) -> bool:
        """Whether what an entity is can be said of these tags."""
        with suppress(DataError):  # scores are refused, tags are right all the same
            return parts_entities(self.labels)
        return False

    def measure(self, predictions: Sequence[Output], references: Sequence[Example]) -> Measure:
        """Return seqeval's F1, precision and recall, and the accuracy of tags; only that where tags
        part no entities.

        Raises:
            DataError: for tags of a scheme that is not known, and predictions of other words.
        """
        true = [
            [self.labels[n] for n in self._targets(example, len(_words(example)[0]))]
            for example in references
        ]
        for prediction, tags, example in zip(predictions, true, references, strict=True):
            if len(prediction["prediction"]) != len(tags):
                raise DataError(
                    "a prediction is not one tag a word",
                    where=f"example {example['id']}",
                    remedy="give one for each word",
                    value=f"{len(prediction['prediction'])} tags, {len(tags)} words",
                )
        given = [prediction["prediction"] for prediction in predictions]
        if parts_entities(self.labels):
            return entity_f1(given, true)
        return tag_accuracy(given, true)


def _words(example: Example) -> tuple[list[str], list[bool], list[int]]:
    """Return the words, whether a space comes before each, and where they begin in the text (empty
    where they came as words).
    """
    import regex

    if example.get("words"):
        words = [str(word) for word in _listed(example["words"])]
        edges = [
            regex.search(rf"{UNSPACED}$", a) or regex.match(UNSPACED, b) for a, b in pairwise(words)
        ]
        return words, [False, *(not edge for edge in edges)], []
    text = example.get("text") or ""
    if not isinstance(text, str):
        raise BadExample(f"the text is not text: {text!r:.60}")
    matches = list(regex.finditer(rf"{WORD}|\S", text))
    places = [match.start() for match in matches]
    return (
        [match.group() for match in matches],
        [text[place - 1 : place].isspace() for place in places],
        places,
    )


def _listed(value: object) -> Sequence[object]:
    if not isinstance(value, (str, list)):
        raise BadExample(f"neither a list nor text with spaces: {value!r:.60}")
    return value.split() if isinstance(value, str) else value
