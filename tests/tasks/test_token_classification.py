"""Token classification: alignment, windows, the loss by hand, equality with transformers' pipeline,
and a toy problem learnt.
"""

from __future__ import annotations

import pytest
import torch
from transformers import BertForTokenClassification, pipeline

from hfscale.errors import DataError
from hfscale.stream.examples import BadExample
from hfscale.training.accounting import Accounting
from tests.tasks.kit import answers, bert, learn, make_task, marking_tokenizer, rows_of

EXAMPLES = [
    {
        "id": "0",
        "words": ["The", "old", "river", "ran", "slowly"],
        "tags": ["O", "B-AGE", "B-LOC", "O", "O"],
    },
    {
        "id": "1",
        "words": list("河水流过古老的桥"),
        "tags": ["B-LOC", "I-LOC", "O", "O", "B-AGE", "I-AGE", "O", "B-LOC"],
    },
    {"id": "2", "words": ["unbelievable", "bridges"], "tags": ["O", "B-LOC"]},
]


def task_of(kind: str = "wordpiece", **options):
    return make_task("token_classification", EXAMPLES, tokenizer=marking_tokenizer(kind), **options)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_the_first_token_of_each_word_is_asked(kind):
    task = task_of(kind)
    assert task.labels == ["O", "B-AGE", "B-LOC", "I-AGE", "I-LOC"]
    for example in EXAMPLES:
        [feature] = task.features(example)
        assert feature["words"] == list(range(len(example["words"])))
        assert [task.labels[n] for n in feature["labels"]] == example["tags"]
        ends = [*feature["positions"][1:], len(feature["input_ids"]) - 1]
        pieces = [
            feature["input_ids"][a:b] for a, b in zip(feature["positions"], ends, strict=True)
        ]
        read = [task.setting.tokenizer.decode(piece).strip().replace(" ", "") for piece in pieces]
        assert read == [word.lower() if kind == "wordpiece" else word for word in example["words"]]


def test_words_are_tokenized_as_in_running_text():
    task = task_of("bpe")
    text = "The old, unbelievable river 河 ran."
    words = ["The", "old,", "unbelievable", "river", "河", "ran."]
    running = task.setting.tokenizer(text)["input_ids"]
    assert task.features({"id": "0", "text": text})[0]["input_ids"] == running
    # Chinese words have none between them
    no_space = task.setting.tokenizer(text.replace(" 河 ", "河"))["input_ids"]
    assert task.features({"id": "0", "words": words})[0]["input_ids"] == no_space
    assert task.features({"id": "0", "words": " ".join(words)})[0]["input_ids"] == no_space


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_long_sentences_are_windows_that_judge_every_word_once(kind):
    task = task_of(kind, seq_len=16)
    long = {
        "id": "0",
        "words": ["river", "unbelievable", "河"] * 12,
        "tags": ["B-LOC", "O", "O"] * 12,
    }
    features = task.features(long)
    assert len(features) > 3 and max(len(feature["input_ids"]) for feature in features) <= 16
    assert sorted(word for feature in features for word in feature["words"]) == list(range(36))
    asked = {
        word: task.labels[n]
        for feature in features
        for word, n in zip(feature["words"], feature["labels"], strict=True)
    }
    assert [asked[word] for word in range(36)] == long["tags"]
    assert Accounting(task).counts([task.collate(rows_of(task, [long]))]) == {
        "token_classification": 36
    }


def test_the_loss_by_hand_and_fillers():
    task = task_of()
    model = bert(task, BertForTokenClassification)
    batch = task.collate(rows_of(task, EXAMPLES, valid=[True, True, False]))
    assert Accounting(task).counts([batch]) == {"token_classification": 13}
    losses, _ = task.judge(model, batch, rows_of(task, EXAMPLES))
    probabilities = model(**batch.inputs).logits.log_softmax(-1)
    for b, feature in enumerate(rows_of(task, EXAMPLES).features[:2]):
        by_hand = -sum(
            probabilities[b, at, label]
            for at, label in zip(feature["positions"], feature["labels"], strict=True)
        )
        assert losses["token_classification"][b].item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert losses["token_classification"][2] == 0
    alone = task.loss(model, task.collate(rows_of(task, EXAMPLES[:1])))["token_classification"][0]
    # padding changes nothing
    assert alone.item() == pytest.approx(losses["token_classification"][0].item(), rel=1e-5)


def test_it_learns_and_finds_entities_in_text_as_the_pipeline_does():
    task = task_of()
    model = bert(task, BertForTokenClassification)
    assert learn(task, model, EXAMPLES, steps=60) < 0.05
    predicted = answers(task, model, EXAMPLES)
    assert [p["prediction"] for p in predicted] == [e["tags"] for e in EXAMPLES]
    scores = task.measure(predicted, EXAMPLES)
    assert scores.scores()["f1"] == 1.0

    texts = ["The old river ran slowly", "河水流过古老的桥。", "unbelievable bridges, the old 河水"]
    pipe = pipeline(
        "token-classification",
        model=model,
        tokenizer=task.setting.tokenizer,
        aggregation_strategy="first",
    )
    for text, ours in zip(
        texts, answers(task, model, [{"id": "0", "text": text} for text in texts]), strict=True
    ):
        theirs = pipe(text)
        assert [(e["type"], e["start"], e["end"]) for e in ours["entities"]] == [
            (e["entity_group"], e["start"], e["end"]) for e in theirs
        ]
        assert [e["score"] for e in ours["entities"]] == pytest.approx(
            [float(e["score"]) for e in theirs], abs=1e-5
        )
        assert [text[e["start"] : e["end"]] for e in ours["entities"]] == [
            e["text"] for e in ours["entities"]
        ]
    assert [e["text"] for e in ours["entities"]][:1] == ["bridges"]


def test_other_schemes_are_scored_and_told_as_entities():
    """BMES, BILOU and bare tags; a scheme that is not known is refused before anything is
    trained.
    """
    tagged = [{"id": "0", "words": "王 伟 丽 来", "tags": "B-P M-P E-P O"}]
    task = make_task("token_classification", tagged, tokenizer=marking_tokenizer("wordpiece"))
    assert task.score([{"prediction": ["B-P", "M-P", "E-P", "O"]}], tagged)["f1"] == 1.0
    output = {"words": [0, 1, 2, 3], "tags": ["B-P", "M-P", "E-P", "O"], "scores": [1.0] * 4}
    [entity] = task.answer({"text": "王伟丽来"}, [output])["entities"]
    assert (entity["type"], entity["text"]) == ("P", "王伟丽")
    bare = [{"id": "0", "words": "a b c", "tags": "B I O"}]
    scored = make_task("token_classification", bare, tokenizer=marking_tokenizer("wordpiece"))
    assert scored.score([{"prediction": ["B", "O", "O"]}], bare)["f1"] == 0.0
    unknown = [{"id": "0", "words": "a b", "tags": "P-B P-I"}]
    with pytest.raises(BadExample, match="no scheme that is known"):
        make_task("token_classification", unknown, tokenizer=None)


def test_tags_that_are_not_entities_and_numbers():
    tagged = [{"id": "0", "words": "old river", "tags": "ADJ NOUN"}]
    task = make_task("token_classification", tagged, tokenizer=marking_tokenizer("wordpiece"))
    assert task.score([{"prediction": ["ADJ", "ADJ"]}], tagged) == {"accuracy": 0.5}
    output = {"words": [0, 1], "tags": ["ADJ", "NOUN"], "scores": [1.0, 1.0]}
    assert "entities" not in task.answer({"text": "old river"}, [output])
    numbered = make_task(
        "token_classification",
        tagged,
        tokenizer=marking_tokenizer("wordpiece"),
        labels=["O", "B-X"],
    )
    assert numbered.features({"id": "0", "words": ["old", "river"], "tags": [1, 0]})[0][
        "labels"
    ] == [1, 0]
    assert numbered.features({"id": "0", "words": "old river", "tags": "1 0"})[0]["labels"] == [
        1,
        0,
    ], "as csv has them"
    with pytest.raises(BadExample, match="give their names in order"):
        make_task(
            "token_classification", [{"id": "0", "words": ["a"], "tags": [3]}], tokenizer=None
        )


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ({"words": ["a", "b"], "tags": ["O"]}, "2 words and 1 tags"),
        ({"words": ["a"], "tags": ["B-LOK"]}, "did you mean B-LOC"),
        ({"words": []}, "no words"),
        ({"text": " \n"}, "no words"),
        ({"text": None}, "no words"),
        ({"text": 5}, "not text"),
        ({"words": 5}, "neither a list"),
        *(
            ({"words": ["a"], "tags": tags}, problem)
            for tags, problem in (
                (None, "neither a list"),
                ([None], "not in the set"),
                ([-1], "not in the set"),
                ([["O"]], "not in the set"),
            )
        ),
    ],
)
def test_bad_examples(example, problem):
    with pytest.raises(BadExample, match=problem):
        task_of().features({"id": "7", **example})


def test_predictions_with_a_tag_too_few_are_refused():
    """Else a half-written list would score as if its end had been right."""
    predictions = [{"prediction": example["tags"]} for example in EXAMPLES]
    scores = task_of().score(predictions, EXAMPLES)
    assert scores["f1"] == 1.0 and scores.keys() == task_of().metrics
    with pytest.raises(DataError, match=r"(?s)one tag a word.*example 0.*4 tags, 5 words"):
        task_of().score([{"prediction": EXAMPLES[0]["tags"][:-1]}, *predictions[1:]], EXAMPLES)


def test_a_word_without_a_token_is_outside():
    task = task_of()
    example = {"id": "0", "words": ["old", "\u200b", "river"], "tags": ["B-AGE", "O", "B-LOC"]}
    [feature] = task.features(example)
    assert feature["words"] == [0, 2]
    model = bert(task, BertForTokenClassification)
    torch.manual_seed(1)
    [predicted] = answers(task, model, [example])
    assert len(predicted["prediction"]) == 3 and predicted["prediction"][1] == "O"
