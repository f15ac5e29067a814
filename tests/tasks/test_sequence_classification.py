"""Sequence classification on a bare tiny model: targets, losses done by hand, predictions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hfscale.config.schema import Named
from hfscale.errors import ConfigError
from hfscale.objectives.base import Setting, check_options
from hfscale.stream.examples import BadExample, Examples
from hfscale.tasks.labels import all_labels
from hfscale.tasks.sequence_classification import SequenceClassification
from hfscale.tasks.table import load_task, task_class
from hfscale.training.accounting import Accounting

WORDS = ["[PAD]", "[UNK]", "[SEP]", "good", "bad", "film", "book"]


def words_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]"
    )


def make(examples, **options):
    named = Named(name="sequence_classification", options=options)
    kind = task_class(named.name)
    facts = kind.facts(kind.Options(**options), examples)
    return load_task(named, Setting(seq_len=4, tokenizer=words_tokenizer(), facts=facts))


def rows_of(task, examples) -> Examples:
    features = [feature for example in examples for feature in task.features(example)]
    n = len(features)
    return Examples(
        features,
        torch.ones(n, dtype=torch.bool),
        torch.zeros(n, dtype=torch.int16),
        torch.arange(n),
    )


def model_of(task):
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            **task.model_overrides(),
        )
    ).eval()


ONE = [
    {"id": "0", "text": "good film", "label": "+"},
    {"id": "1", "text": "bad", "label": "-"},
    {"id": "2", "text": "good", "label": "+"},
]


def test_a_single_label():
    task = make(ONE, class_weights="balanced")
    rows = rows_of(task, ONE)
    batch = task.collate(rows)
    assert batch.inputs["input_ids"].tolist() == [[3, 5], [4, 0], [3, 0]]
    assert [row.tolist() for row in batch.rows()] == [[[3, 5]], [[4]], [[3]]]
    assert Accounting(task).counts([batch]) == {"classification": 3}
    model = model_of(task)
    losses, outputs = task.judge(model, batch, rows)
    weights = {"+": 3 / (2 * 2), "-": 3 / (2 * 1)}
    by_hand = [
        -weights[e["label"]] * math.log(o["scores"][e["label"]])
        for e, o in zip(ONE, outputs, strict=True)
    ]
    assert losses["classification"].tolist() == pytest.approx(by_hand, rel=1e-5)
    assert outputs == task.predict(model, batch, rows)
    assert model.config.id2label == {0: "+", 1: "-"}
    scores = task.score([{"prediction": label} for label in "+++"], ONE)
    assert scores.keys() <= task.metrics
    # f1: of "-", the last
    assert scores == pytest.approx(
        {"accuracy": 2 / 3, "f1": 0.0, "f1_macro": 0.4, "f1_micro": 2 / 3, "mcc": 0.0}
    )


def test_a_validation_loss_is_plain():
    """Neither smoothed nor weighted: else runs of other options could not be compared, nor
    tasks.
    """
    task = make(ONE, class_weights="balanced", label_smoothing=0.3)
    rows = rows_of(task, ONE)
    model, batch = model_of(task), task.collate(rows)
    with torch.no_grad():
        losses, outputs = task.judge(model, batch, rows)
    plain = [-math.log(o["scores"][e["label"]]) for e, o in zip(ONE, outputs, strict=True)]
    assert losses["classification"].tolist() == pytest.approx(plain, rel=1e-5)
    assert task.loss(model, batch)["classification"].tolist() != pytest.approx(plain, rel=1e-2)


def test_several_labels_and_numbers():
    several = [
        {"id": "0", "text": "good film", "label": "a, b"},
        {"id": "1", "text": "bad", "label": "b"},
    ]
    task = make(several, separator=",")
    batch = task.collate(rows_of(task, several))
    scores = task.score([{"prediction": ["a"]}, {"prediction": ["b"]}], several)
    assert scores.keys() <= task.metrics
    assert scores == pytest.approx({"accuracy": 0.5, "f1_micro": 0.8, "f1_macro": 5 / 6})
    assert task.problem == "multi_label_classification" and batch.labels_BT.tolist() == [
        [1, 1],
        [0, 1],
    ]
    assert task.loss(model_of(task), batch)["classification"].tolist() == pytest.approx(
        [math.log(2)] * 2, abs=0.05
    )

    numbers = [
        {"id": "0", "text": "good", "pair": "film", "label": 2.5},
        {"id": "1", "text": "bad", "label": 1},
    ]
    task = make(numbers)
    batch, model = task.collate(rows_of(task, numbers)), model_of(task)
    predicted = [
        output["prediction"] for output in task.predict(model, batch, rows_of(task, numbers))
    ]
    assert task.score([{"prediction": 2.0}, {"prediction": 1.0}], numbers) == pytest.approx(
        {"pearson": 1.0, "spearman": 1.0, "mse": 0.125}
    )
    assert task.loss(model, batch)["classification"].tolist() == pytest.approx(
        [(predicted[0] - 2.5) ** 2, (predicted[1] - 1) ** 2]
    )


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([2.5, 3.0, 1], "regression"),
        ([1.0, 0.0, float("nan")], "single_label_classification"),
        ([0.5, float("nan")], "regression"),
        (["2.5", "3.0", "1"], "regression"),
        ([1, 2, 5.0], "single_label_classification"),
        (["1.5", "2", "good"], "single_label_classification"),
        (["good", "inf", "nan"], "single_label_classification"),
        ([["a"], []], "multi_label_classification"),
    ],
)
def test_labels_say_what_the_problem_is(labels, problem):
    assert (
        make(
            [{"id": str(n), "text": "good", "label": label} for n, label in enumerate(labels)]
        ).problem
        == problem
    )


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ({"text": " "}, "empty"),
        ({"text": "good", "label": "++"}, r"not in the set"),
        ({"text": 3}, "not text"),
        ({"text": "good", "pair": 5}, "pair is not text"),
        *(
            ({"text": "good", "label": label}, "not in the set")
            for label in (float("nan"), {"a": 1})
        ),
        *(({"text": "good", "label": label}, "there is no label") for label in (None, "")),
    ],
)
def test_bad_examples(example, problem):
    with pytest.raises(BadExample, match=problem):
        make(ONE).features({"id": "7", **example})


def test_labels_are_names_however_they_are_written():
    texts = [
        {"id": str(n), "text": "good", "label": label}
        for n, label in enumerate((1, "1", 1.0, 0, None, float("nan"), "x", ["y", {}]))
    ]
    assert all_labels(example["label"] for example in texts) == ["0", "1", "x", "y"]
    assert all_labels(["10", "2", "-1", 0, "two", "nan"]) == ["-1", "0", "2", "10", "nan", "two"], (
        "csv has numbers as texts"
    )
    task = make(texts[:4])
    assert task.labels == ["0", "1"] and [
        task.features(example)[0]["labels"] for example in texts[:4]
    ] == [1, 1, 1, 0]
    assert task.score([{"prediction": "1"}] * 3, texts[:3])["accuracy"] == 1.0
    for label in ("nan", float("inf"), None):
        with pytest.raises(BadExample, match="not a number"):
            make(texts, problem="regression").features({"id": "0", "text": "good", "label": label})
    with pytest.raises(BadExample, match="no example has a label"):
        make(texts[4:5])
    with pytest.raises(ConfigError, match="'a' occurs twice"):
        check_options(task.Options, {"labels": ["a", "b", "a"]})


def test_numbers_count_from_0_where_labels_have_names():
    """As data sets of the hub have them: a model's own names for 0, 1, ..."""
    numbered = [{**example, "label": n % 2} for n, example in enumerate(ONE)]
    task = make(numbered, labels=["bad", "good"], class_weights="balanced")
    assert [task.features(example)[0]["labels"] for example in numbered] == [
        n % 2 for n in range(len(ONE))
    ]
    assert sum(task.setting.facts["counts"]) == len(ONE) and all(task.setting.facts["counts"])
    assert (
        task.score([{"prediction": ("bad", "good")[n % 2]} for n in range(len(ONE))], numbered)[
            "accuracy"
        ]
        == 1.0
    )
    stars = make(
        [{**example, "label": n % 2 + 1} for n, example in enumerate(ONE)], labels=["1", "2"]
    )
    for strict, label in ((task, 2), (task, -1), (stars, 0)):
        with pytest.raises(BadExample, match="not in the set"):
            strict.features({"id": "0", "text": "good", "label": label})


def test_a_reference_without_a_label_is_refused():
    with pytest.raises(BadExample, match="no label: 1"):
        make(ONE).score([{"prediction": "+"}] * 3, [ONE[0], {**ONE[1], "label": None}, ONE[2]])


def test_labels_of_other_predictions_that_are_in_no_set_are_counted_and_shown():
    task = make(ONE)
    right = [example["label"] for example in ONE]
    assert task.measure([{"prediction": label} for label in right], ONE).notes == {
        "f1": "of '-', the second label"
    }
    measure = task.measure(
        [{"prediction": "meh"}, *({"prediction": label} for label in right[1:])], ONE
    )
    assert measure.notes["unknown labels"].startswith("1, such as 'meh'")
    assert measure.scores()["accuracy"] == pytest.approx(1 - 1 / len(ONE))
    several = [
        {"id": "0", "text": "good", "label": ["a", "b"]},
        {"id": "1", "text": "good", "label": ["a"]},
    ]
    measure = make(several).measure([{"prediction": ["a", "b"]}, {"prediction": "a"}], several)
    assert measure.notes == {} and measure.scores()["accuracy"] == 1.0, (
        "a text is one label, not its letters"
    )


def test_a_long_text_is_cut_and_says_so():
    [feature] = make(ONE).features({"id": "0", "text": "good bad film book good"})
    assert len(feature["input_ids"]) == 4 and feature["truncated"]


# ---------------------------------------------------------------------------------- what labels are
def facts_of(values: list[Any], **options: Any) -> dict[str, Any]:
    kind = task_class("sequence_classification")
    examples = [{"id": str(n), "text": "x", "label": label} for n, label in enumerate(values)]
    return kind.facts(kind.Options(**options), examples)


def classifier(facts: dict[str, Any], **options: Any) -> Any:
    setting = Setting(seq_len=4, tokenizer=words_tokenizer(), facts=facts)
    return load_task(Named(name="sequence_classification", options=options), setting)


ONE_HOT = [[1, 0, 0], [0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    "vectors",
    [
        ONE_HOT,
        [[float(n) for n in row] for row in ONE_HOT],
        [[bool(n) for n in row] for row in ONE_HOT],
        ["|".join(map(str, row)) for row in ONE_HOT],
    ],
    ids=["ints", "floats", "bools", "csv"],
)
def test_lists_of_zeros_and_ones_are_vectors(vectors: list[Any]) -> None:
    with pytest.raises(BadExample, match="name the 3 labels"):
        facts_of(vectors, separator="|")
    facts = facts_of(vectors, separator="|", labels=["a", "b", "c"])
    assert facts == {
        "problem": "multi_label_classification",
        "labels": ["a", "b", "c"],
        "counts": [1, 1, 1],
    }
    task = classifier(facts, separator="|", labels=["a", "b", "c"])
    targets = [
        task.features({"id": "0", "text": "x", "label": vector})[0]["labels"] for vector in vectors
    ]
    assert targets == ONE_HOT
    references = [{"id": str(n), "label": vector} for n, vector in enumerate(vectors)]
    right = [{"prediction": names} for names in (["a"], ["b", "c"], [])]
    assert task.measure(right, references).scores()["accuracy"] == 1.0


def test_lists_of_fractions_are_no_labels() -> None:
    with pytest.raises(BadExample, match="no labels"):
        facts_of([[0.3, 0.7], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["1.0", "0.0", "1.0"], "single_label_classification"),
        (["3", "4.0"], "single_label_classification"),
        (["2.5", "3"], "regression"),
        (["1e-3", "2"], "regression"),
        (["v1.0", "v2.0"], "single_label_classification"),
    ],
)
def test_csv_and_typed_tables_are_read_by_one_rule(values: list[str], problem: str) -> None:
    texts = facts_of(values)
    assert texts["problem"] == problem
    if not values[0].startswith("v"):
        assert texts == facts_of([float(value) for value in values])


def test_labels_that_look_alike_are_refused() -> None:
    for one, other in (("good", "good "), ("caf\u00e9", "cafe\u0301")):
        with pytest.raises(BadExample, match="look alike"):
            facts_of([one, other, "bad"])


def test_numbers_count_in_the_order_that_the_user_says() -> None:
    """A model with labels in an order of its own, and data that count in another."""
    facts = {"problem": "single_label_classification", "labels": ["neutral", "no", "yes"]}
    task = classifier(facts, labels=["yes", "neutral", "no"])
    assert task.labels == ["neutral", "no", "yes"]
    example = {"id": "0", "text": "x", "label": 0}
    assert task.features(example)[0]["labels"] == 2
    measure = task.measure([{"prediction": "yes"}], [example])
    assert measure.scores()["accuracy"] == 1.0 and not measure.notes
    guess = classifier(facts).measure([{"prediction": "yes"}], [example])
    assert guess.scores()["accuracy"] == 0.0
    assert "0 is neutral" in guess.notes["numbered labels"]
    with pytest.raises(ConfigError, match=r"no such label[\s\S]*maybe"):
        _ = classifier(facts, labels=["yes", "maybe"]).labels
    unnamed = {**facts, "labels": ["LABEL_0", "LABEL_1", "LABEL_2"]}
    assert classifier(unnamed, labels=["yes", "neutral", "no"]).labels == ["yes", "neutral", "no"]


def test_labels_have_the_order_of_their_numbers() -> None:
    """Whatever order config.json lists them in: JSON that was sorted by its keys has 10 before
    2.
    """
    numbered = {int(key): f"l{key}" for key in sorted(map(str, range(12)))}
    config = BertConfig(num_labels=12)
    config.id2label = numbered
    assert list(config.id2label) != sorted(config.id2label)
    assert SequenceClassification.known(config)["labels"] == [f"l{n}" for n in range(12)]
