"""Extractive question answering: labels, windows, the loss by hand, the choice of the answer, and a
toy problem learnt.
"""

from __future__ import annotations

import itertools
import math
import shutil

import pytest
import torch
from transformers import BertForQuestionAnswering, pipeline

from hfscale.errors import ConfigError
from hfscale.stream.examples import BadExample
from hfscale.tasks import extractive_qa, question_answering
from hfscale.training.accounting import Accounting
from tests.tasks.kit import answers, bert, learn, make_task, marking_tokenizer, rows_of

EN = "The old river ran slowly under the unbelievable bridges of the town."
ZH = "河水慢慢地流过古老的桥，城里的人都在桥上看河水。"
EXAMPLES = [
    {
        "id": "0",
        "question": "What ran slowly?",
        "context": EN,
        "answers": {"text": ["old river"], "answer_start": [4]},
    },
    {
        "id": "1",
        "question": "Under the what?",
        "context": EN,
        "answers": "unbelievable bridges",
        "answer_start": 35,
    },
    {
        "id": "2",
        "question": "河水流过的桥？",
        "context": ZH,
        "answers": [{"text": "古老的桥", "answer_start": 7}],
    },
    {
        "id": "3",
        "question": "人都在桥上看？",
        "context": ZH,
        "answers": ["河水"],
        "answer_start": [21],
    },
    {
        "id": "4",
        "question": "Where is the cat?",
        "context": EN,
        "answers": {"text": [], "answer_start": []},
    },
]


def task_of(kind: str = "wordpiece", examples=EXAMPLES, **options):
    return make_task(
        "extractive_qa", examples, tokenizer=marking_tokenizer(kind), **{"seq_len": 128, **options}
    )


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_labels_are_the_tokens_of_the_answer(kind):
    task = task_of(kind)
    for example, text in zip(
        EXAMPLES, ["old river", "unbelievable bridges", "古老的桥", "河水", ""], strict=True
    ):
        [feature] = task.features(example)
        first, last = feature["labels"]
        if not text:
            assert (first, last) == (0, 0)
            continue
        begin, end = feature["begins"][first], feature["ends"][last]
        assert example["context"][begin:end].strip() == text
        assert task.setting.tokenizer.decode(
            feature["input_ids"][first : last + 1]
        ).strip().replace(" ", "") == text.replace(" ", "")
    [first] = task.features({**EXAMPLES[3], "answer_start": [0]})
    assert task.features(EXAMPLES[3])[0]["labels"][0] > first["labels"][0]  # 河水 is there twice


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_windows_overlap_and_cover_the_context(kind):
    task = task_of(kind, seq_len=64, stride=24)
    example = {**EXAMPLES[1], "context": "河水。" * 30 + EN, "answer_start": 90 + 35}
    features = task.features(example)
    assert len(features) > 2 and max(len(feature["input_ids"]) for feature in features) <= 64
    covered = [
        range(b, e)
        for feature in features
        for b, e in zip(feature["begins"], feature["ends"], strict=True)
        if b >= 0
    ]
    assert {
        c for n, c in enumerate(example["context"]) if not any(n in place for place in covered)
    } <= {" "}
    labels = [feature["labels"] for feature in features]
    assert [0, 0] in labels and any(label != [0, 0] for label in labels)
    assert Accounting(task).counts([task.collate(rows_of(task, [example]))]) == {
        "extractive_qa": len(features)
    }


def test_an_answer_that_no_window_holds_whole_teaches_nothing():
    """It was taught "none" in every window, though it is there; it is scored like any other."""
    task = task_of(seq_len=32, stride=4)
    example = {**EXAMPLES[1], "context": "river " * 40, "answers": "river " * 24 + "river"}
    features = task.features(example)
    assert len(features) > 1 and {f["unlearnt"] for f in features} == {extractive_qa.CUT}
    batch = task.collate(rows_of(task, [example]))
    assert Accounting(task).counts([batch]) == {"extractive_qa": 0}
    model = bert(task, BertForQuestionAnswering)
    assert task.loss(model, batch)["extractive_qa"].tolist() == [0.0] * len(features)
    assert answers(task, model, [example])[0]["prediction"]
    held = task.features({**example, "answers": "river river"})
    assert any(f["labels"] != [0, 0] for f in held) and "unlearnt" not in held[0]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
@pytest.mark.parametrize(("seq_len", "stride"), [(32, 8), (40, 0), (64, 24)])
def test_windows_are_those_that_the_tokenizer_would_cut(kind: str, seq_len: int, stride: int):
    """A version of tokenizers that loses what overflows (0.23.1) loses nothing here: cut by hand,
    of one whole encoding.
    """
    tokenizer = marking_tokenizer(kind)
    how = {"max_length": seq_len, "stride": stride}
    for context in (EN, ZH * 5, EN * 4 + ZH):
        made = question_answering.windows(tokenizer, how, question="What ran?", context=context)
        theirs = tokenizer(
            "What ran?",
            context,
            truncation="only_second",
            max_length=seq_len,
            stride=stride,
            return_overflowing_tokens=True,
        )
        assert [window["input_ids"] for window in made] == theirs["input_ids"]
        assert [window.get("token_type_ids") for window in made] == theirs.get(
            "token_type_ids", [None] * len(made)
        )


def test_white_space_is_no_answer():
    """Byte-level tokenizers have tokens of nothing else, as in code: they gave "", which ended
    before it began.
    """
    task = task_of("bpe", EXAMPLES[:4])
    context = "old river\n\n   \n ran"
    [window] = task.features({"id": "0", "question": "what?", "context": context, "answers": "ran"})
    own = [
        context[begin:end]
        for begin, end in zip(window["begins"], window["ends"], strict=True)
        if begin >= 0
    ]
    assert (
        own
        and all(map(str.strip, own))
        and context[window["begins"][window["labels"][0]] :].strip() == "ran"
    )
    # is what the model likes best
    white = torch.tensor([9.0 * (begin < 0) for begin in window["begins"]])
    spans = question_answering.best_spans(white, white, window=window, how=task.how)
    answer = question_answering.choose(context, [spans], how=task.how)
    assert answer["prediction"] and answer["start"] < answer["end"]


def test_the_loss_by_hand_does_not_depend_on_padding():
    task = task_of()
    model = bert(task, BertForQuestionAnswering)
    batch = task.collate(rows_of(task, EXAMPLES, valid=[True] * 4 + [False]))
    losses = task.loss(model, batch)["extractive_qa"]
    assert Accounting(task).counts([batch]) == {"extractive_qa": 4} and losses[4] == 0
    for n, example in enumerate(EXAMPLES[:4]):
        [feature] = task.features(example)
        output = model(input_ids=torch.tensor([feature["input_ids"]]))
        first, last = feature["labels"]
        by_hand = (
            -(
                output.start_logits.log_softmax(-1)[0, first]
                + output.end_logits.log_softmax(-1)[0, last]
            )
            / 2
        )
        assert losses[n].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_choice_equals_a_search_over_all_spans_of_all_windows():
    """Written out as run_qa.py has it: the best start + end of ordered spans of the context; none
    is the lowest score of [CLS].
    """
    task = task_of(seq_len=40, stride=8, max_answer_tokens=5, n_best=4)
    model = bert(task, BertForQuestionAnswering)
    example = {"id": "0", "question": "Under the what?", "context": ZH + EN + ZH}
    spans, none = {}, math.inf
    for feature in task.features(example):
        assert "labels" not in feature
        with torch.no_grad():
            output = model(input_ids=torch.tensor([feature["input_ids"]]))
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        none = min(none, start[0] + end[0])
        for first, last in itertools.combinations_with_replacement(range(len(start)), 2):
            if feature["begins"][first] >= 0 and feature["begins"][last] >= 0 and last - first < 5:
                place = feature["begins"][first], feature["ends"][last]
                spans[place] = max(spans.get(place, -math.inf), start[first] + end[last])
    best = sorted(spans, key=spans.__getitem__, reverse=True)[:4]
    [ours] = answers(task, model, [example])
    assert [(span["start"], span["end"]) for span in ours["n_best"]] == best
    assert [span["text"] for span in ours["n_best"]] == [example["context"][a:b] for a, b in best]
    assert ours["no_answer_score"] == pytest.approx(none - spans[best[0]], abs=1e-5)
    total = sum(map(math.exp, [none, *(spans[place] for place in best)]))
    assert [span["score"] for span in ours["n_best"]] == pytest.approx(
        [math.exp(spans[place]) / total for place in best], rel=1e-4
    )
    assert ours["prediction"] == ("" if ours["no_answer_score"] > 0 else ours["n_best"][0]["text"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_it_learns_also_when_there_is_no_answer(kind):
    task = task_of(kind)
    model = bert(task, BertForQuestionAnswering)
    task.finish(model, None)
    assert type(task).known(type(model.config).from_dict(model.config.to_dict())) == {
        "no_answer": True
    }
    assert learn(task, model, EXAMPLES, steps=300, lr=2e-3) < 0.05
    predicted = answers(task, model, EXAMPLES)
    assert [p["prediction"] for p in predicted] == [
        "old river",
        "unbelievable bridges",
        "古老的桥",
        "河水",
        "",
    ]
    assert (predicted[3]["start"], predicted[3]["end"], predicted[4]["start"]) == (21, 23, None)
    scores = task.score(predicted, EXAMPLES)
    assert scores.keys() <= task.metrics
    assert (
        scores["exact_match"]
        == scores["f1"]
        == scores["no_answer_accuracy"]
        == scores["best_f1"]
        == 100.0
    )
    mended = [{**predicted[0], "prediction": "a bridge"}, *predicted[1:]]
    # a prediction that was changed by hand counts, not its best span
    assert task.score(mended, EXAMPLES)["exact_match"] == 80.0
    never = task_of(kind, no_answer_threshold=1e6)
    # rescored at another threshold, without a model
    assert never.score(predicted, EXAMPLES)["no_answer_accuracy"] == 0.0


def test_the_pipeline_that_goes_along_gives_the_same_answers(tmp_path):
    task = task_of(seq_len=40, stride=8, n_best=3)
    model = bert(task, BertForQuestionAnswering)
    task.finish(model, task.setting.tokenizer)
    model.save_pretrained(tmp_path)
    task.setting.tokenizer.save_pretrained(tmp_path)
    shutil.copy(question_answering.__file__, tmp_path)
    pipe = pipeline("question-answering", str(tmp_path), trust_remote_code=True)
    asked = [
        {"question": "河水流过的桥？", "context": EN + ZH + EN},
        {"question": "What ran slowly?", "context": EN},
    ]
    theirs = [pipe(**asked[0]), *pipe(asked)]
    ours = answers(
        task, model, [{"id": str(n), **example} for n, example in enumerate([asked[0], *asked])]
    )
    assert [(a["answer"], a["start"], a["end"]) for a in theirs] == [
        (p["prediction"], p["start"], p["end"]) for p in ours
    ]
    assert [a["score"] for a in theirs] == pytest.approx([p["score"] for p in ours], rel=1e-4)


def test_answers_of_others_are_scored_as_they_are():
    examples = [
        {"id": "0", "question": "Who?", "context": "Ada wrote it.", "answers": "Ada"},
        {"id": "1", "question": "When?", "context": "Ada.", "answers": ""},
    ]
    task = task_of(examples=examples)
    assert (
        task.score([{"id": "0", "prediction": "Ada"}, {"id": "1", "prediction": ""}], examples)[
            "exact_match"
        ]
        == 100.0
    )
    assert (
        task.score([{"id": "0", "prediction": ""}, {"id": "1", "prediction": "Ada"}], examples)[
            "exact_match"
        ]
        == 0.0
    )


def test_without_questions_that_have_no_answer_there_always_is_one():
    task = task_of(examples=EXAMPLES[:4])
    assert task.no_answer is False
    [predicted] = answers(task, bert(task, BertForQuestionAnswering), EXAMPLES[4:])
    assert predicted["prediction"] == predicted["n_best"][0]["text"] != ""
    assert task_of(examples=EXAMPLES[:4], no_answer=True).no_answer is True


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"question": " "}, "question is empty"),
        ({"context": None}, "context is empty"),
        ({"context": "\u200b", "answers": ""}, "nothing of the context"),
        ({"answers": "a cat"}, "'a cat' is not in its context"),
        *(
            ({"answers": answers}, "neither texts nor as in SQuAD")
            for answers in (
                5,
                [None],
                {"tekst": ["a"]},
                {"text": ["a"], "answer_start": ["x"]},
                {"text": ["a", "b"], "answer_start": [1]},
            )
        ),
    ],
)
def test_bad_examples(change, problem):
    with pytest.raises(BadExample, match=problem):
        task_of().features({**EXAMPLES[0], **change})


def test_a_wrong_start_is_searched_and_a_column_without_answers_refused():
    assert (
        task_of().features({**EXAMPLES[1], "answer_start": 3})[0]["labels"]
        == task_of().features(EXAMPLES[1])[0]["labels"]
    )
    with pytest.raises(BadExample, match="no example has an answer"):
        task_of(
            examples=[
                {"id": "0", "question": "x", "context": "y", "answers": ""},
                {**EXAMPLES[1], "answers": 5},
            ]
        )


def test_a_question_that_fills_the_window_is_cut():
    [*features] = task_of(seq_len=24).features(
        {**EXAMPLES[0], "question": "Under the bridges? " * 20}
    )
    assert all(feature["truncated"] and len(feature["input_ids"]) <= 24 for feature in features)
    assert max(max(feature["ends"]) for feature in features) == len(EN)
    with pytest.raises(ConfigError, match="too short"):
        task_of(seq_len=8)
