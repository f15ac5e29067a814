"""Translation and summarization: losses by hand, toy languages learnt in seconds, exports that
answer in transformers' pipelines.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import pipeline

from hfscale.errors import ConfigError
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.stream.examples import BadExample
from hfscale.tasks import text2text
from hfscale.training.accounting import Accounting
from tests.tasks.toys import load, predict, rows_of, train, words_tokenizer

ENGLISH = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CHINESE = list("一二三四五六七八九十")
CAUSAL = {"family": "gpt2", "prompt": "{source} =>"}
EXAMPLES = [
    {"id": "0", "source": "one two three", "target": "三 二"},
    {"id": "1", "source": "four", "target": "四"},
]


def tokenizer() -> Any:
    return words_tokenizer(" ".join([*ENGLISH, *CHINESE, "=>", "translate:", "TL;DR:"]))


def toy(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return numbers in English, and the same in Chinese."""
    rng = random.Random(seed)
    numbers = [[rng.randrange(10) for _ in range(rng.randint(1, 3))] for _ in range(count)]
    return [
        {
            "id": str(n),
            "source": " ".join(ENGLISH[k] for k in row),
            "target": " ".join(CHINESE[k] for k in row),
        }
        for n, row in enumerate(numbers)
    ]


def by_hand(task: Any, model: Any, example: dict[str, Any], *, smoothing: float = 0.0) -> float:
    """Return the summed loss of one example alone, from transformers' own logits."""
    (feature,) = task.features(example)
    source, target = torch.tensor([feature["input_ids"]]), torch.tensor([feature["labels"]])
    if model.config.is_encoder_decoder:
        logits = model(
            input_ids=source, decoder_input_ids=torch.cat([torch.tensor([[0]]), target[:, :-1]], 1)
        ).logits
    else:
        logits = model(input_ids=torch.cat([source, target[:, :-1]], 1)).logits[
            :, source.shape[1] - 1 :
        ]
    return F.cross_entropy(logits[0], target[0], reduction="sum", label_smoothing=smoothing).item()


@pytest.mark.parametrize("how", [{"family": "t5", "prefix": "translate: "}, CAUSAL])
def test_the_loss_is_a_sum_over_target_tokens(how: dict[str, Any]) -> None:
    task, model = load("translation", tokenizer(), label_smoothing=0.1, **how)
    batch = task.collate(rows_of(task, EXAMPLES))
    assert Accounting(task).counts([batch]) == {"text": 3 + 2}, "the end token counts"
    wanted = [by_hand(task, model, example, smoothing=0.1) for example in EXAMPLES]
    assert task.loss(model, batch)["text"].tolist() == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():  # validation is not smoothed: its perplexity means something
        assert task.loss(model, batch)["text"].tolist() == pytest.approx(
            [by_hand(task, model, e) for e in EXAMPLES], rel=1e-5
        )
    filled = task.collate(rows_of(task, EXAMPLES, fillers=1))
    assert Accounting(task).counts([filled]) == {"text": 3}
    assert task.loss(model, filled)["text"].tolist() == pytest.approx([wanted[0], 0.0], rel=1e-5)


def test_what_the_model_sees() -> None:
    words = tokenizer()
    task, _ = load("translation", words, prefix="translate: ")
    batch = task.collate(rows_of(task, EXAMPLES))
    seen = {
        name: [words.decode(row) for row in ids]
        for name, ids in batch.inputs.items()
        if name != "attention_mask"
    }
    assert seen == {
        "input_ids": ["translate: one two three", "translate: four <pad> <pad>"],
        "decoder_input_ids": ["<pad> 三 二", "<pad> 四 </s>"],
    }
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (
        words.decode(batch.labels_BT[0]) == "三 二 </s>" and batch.labels_BT[1, 2] == IGNORE_INDEX
    )
    assert [row.tolist() for row in batch.rows()] == [
        [words(f"translate: {e['source']}")["input_ids"]] for e in EXAMPLES
    ]
    task, _ = load("translation", words, **CAUSAL)
    batch = task.collate(rows_of(task, EXAMPLES))
    assert [words.decode(row) for row in batch.inputs["input_ids"]] == [
        "one two three => 三 二",
        "four => 四 <pad> <pad> <pad>",
    ]
    assert batch.labels_BT[1, 0] == IGNORE_INDEX and words.decode(
        batch.labels_BT[1, 1:3]
    ).split() == ["四", "</s>"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [{"family": "t5", "prefix": "translate: "}, {"family": "bart"}, CAUSAL],
    ids=["t5", "bart", "gpt2"],
)
def test_a_toy_language_is_learnt_exported_and_answered_alike(
    how: dict[str, Any], tmp_path: Path
) -> None:
    words = tokenizer()
    model = {
        "t5": {"d_model": 64, "initializer_factor": 0.3},
        "bart": {"d_model": 64},
        "gpt2": {"n_embd": 64},
    }[how["family"]]
    task, model = load(
        "translation",
        words,
        seq_len=24,
        model=model,
        max_target_length=10,
        generation={"num_beams": 2, "length_penalty": 0.8},
        **how,
    )
    train(task, model.train(), toy(2000), steps=120, batch=64, lr=8e-3)
    tests = toy(40, seed=1)
    got = predict(task, model.eval(), tests)
    scores = task.score(got, tests)
    assert scores.keys() == task.metrics
    assert scores["chrf"] > (25 if how["family"] == "t5" else 70) and scores.keys() == {
        "bleu",
        "chrf",
    }, scores

    task.finish(model, words)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    if task.pipeline == "text-generation":  # a chat of one message is the prompt
        chat = pipeline(task.pipeline, str(tmp_path))
        theirs = [
            chat([{"role": "user", "content": e["source"]}])[0]["generated_text"][-1]["content"]
            for e in tests
        ]
    else:
        shutil.copy(text2text.__file__, tmp_path)
        translate = pipeline(task.pipeline, str(tmp_path), trust_remote_code=True)
        theirs = [
            answer["translation_text"]
            for answer in translate([e["source"] for e in tests], batch_size=8)
        ]
    assert [{"prediction": text} for text in theirs] == got


def test_long_texts_are_cut_and_counted() -> None:
    long = {"id": "0", "source": "one two three four five six seven", "target": "一 二 三 四 五"}
    task, _ = load("summarization", tokenizer(), seq_len=4, max_target_length=3)
    (feature,) = task.features(long)
    assert (len(feature["input_ids"]), len(feature["labels"]), feature["truncated"]) == (4, 3, True)
    assert feature["labels"][-1] == tokenizer().eos_token_id
    task, _ = load(
        "summarization",
        words := tokenizer(),
        family="gpt2",
        prompt="{source} TL;DR:",
        seq_len=8,
        max_target_length=3,
    )
    (feature,) = task.features(long)
    assert (words.decode(feature["input_ids"]), feature["truncated"]) == (
        "one two three four TL;DR:",
        True,
    )
    assert task.features({"id": "1", "source": "one"})[0] == {
        "input_ids": words("one TL;DR:")["input_ids"],
        "truncated": False,
    }


def test_what_cannot_be_learnt_from() -> None:
    task, _ = load("translation", tokenizer())
    for bad, why in (
        ({"source": " ", "target": "一"}, "source is empty"),
        ({"source": "one", "target": None}, "target is empty"),
        ({"source": 3, "target": "一"}, "source is not text"),
    ):
        with pytest.raises(BadExample, match=why):
            task.features({"id": "0", **bad})
    task, _ = load(
        "translation",
        tokenizer(),
        family="gpt2",
        prompt="one one one {source}",
        seq_len=4,
        max_target_length=1,
    )
    with pytest.raises(BadExample, match="prompt alone"):
        task.features(EXAMPLES[0])
    with pytest.raises(ConfigError, match=r"data\.max_length, which is 32 for prompt and target"):
        load("translation", tokenizer(), family="gpt2", prompt="{source}", max_target_length=32)
    with pytest.raises(ConfigError, match="no such language"):
        load("translation", tokenizer(), target_language="de_DE")


def test_summaries_are_scored_with_rouge() -> None:
    task, _ = load("summarization", tokenizer())
    scores = task.score(
        [{"prediction": "一 二 三"}, {"prediction": "four"}],
        [{"target": "一 二 三"}, {"target": "five"}],
    )
    assert scores["rouge1"] == pytest.approx(0.5) and scores.keys() == {
        "rouge1",
        "rouge2",
        "rougeL",
        "rougeLsum",
    }


@pytest.mark.parametrize("family", ["MBartTokenizer", "MBart50Tokenizer", "NllbTokenizer"])
def test_language_codes_stand_where_the_family_wants_them(family: str) -> None:
    kind = getattr(transformers, family)
    pieces = [
        *((t, 0.0) for t in ("<s>", "<pad>", "</s>", "<unk>")),
        *(("▁" + w, -1.0) for w in [*ENGLISH, *CHINESE]),
    ]
    codes = ("eng_Latn", "zho_Hans") if family == "NllbTokenizer" else ("en_XX", "zh_CN")
    made = kind(
        vocab={p: n for n, (p, _) in enumerate(pieces)} if family == "NllbTokenizer" else pieces
    )
    if not made.get_vocab().get("▁one"):
        made = kind(vocab=pieces)
    task, model = load(
        "translation", made, family="bart", source_language=codes[0], target_language=codes[1]
    )
    source, target = (made.convert_tokens_to_ids(code) for code in codes)
    (feature,) = task.features(EXAMPLES[0])
    assert source in (feature["input_ids"][0], feature["input_ids"][-1])
    decoder = task.collate(rows_of(task, EXAMPLES[:1])).inputs["decoder_input_ids"][0].tolist()
    if family == "MBartTokenizer":
        assert feature["labels"][-2:] == [2, target] and decoder[0] == target
    else:
        assert feature["labels"][0] == target and feature["labels"][-1] == 2
        assert decoder[:2] == [model.config.decoder_start_token_id, target]
    out = predict(task, model, EXAMPLES)
    assert len(out) == 2
    task.finish(model, made)
    ids = model.generate(torch.tensor([feature["input_ids"]]))[0].tolist()
    assert target in ids[:2]
