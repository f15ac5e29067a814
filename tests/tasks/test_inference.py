"""Masks, hidden states and continuations: what transformers' pipelines answer on the same model and
texts, in batches of any lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertConfig, BertLMHeadModel, pipeline

from hfscale.errors import ConfigError
from hfscale.jobs.asked import settle
from hfscale.jobs.predict import open_task
from hfscale.run.model import find
from hfscale.stream.examples import BadExample
from tests.objectives.tokenizers import tokenizer
from tests.tasks.toys import load, predict

TEXTS = [
    "The old [MASK] ran",
    "河水[MASK]地流过古老的桥。",
    "The [MASK] of the [MASK]",
    "def [MASK](river):",
]


def answers(task: Any, model: Any, texts: list[str]) -> list[Any]:
    role = next(iter(task.columns))
    return [
        answer["prediction"]
        for answer in predict(
            task, model, [{"id": str(n), role: text} for n, text in enumerate(texts)]
        )
    ]


def rounded(value: Any) -> Any:
    """Return the value with numbers that can be compared."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return pytest.approx(value, rel=1e-4) if isinstance(value, float) else value


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_masks_are_filled_as_in_transformers(kind: str) -> None:
    task, model = load("fill_mask", tokenizer(kind), family="bert", seq_len=64, top_k=3)
    theirs = [
        pipeline(task.pipeline, model=model, tokenizer=tokenizer(kind), top_k=3)(text)
        for text in TEXTS
    ]
    assert answers(task, model, TEXTS) == rounded(theirs)
    with pytest.raises(BadExample, match=r"no \[MASK\]"):
        task.features({"id": "0", "text": "nothing"})


def test_hidden_states_are_those_of_transformers() -> None:
    task, model = load("feature_extraction", tokenizer("wordpiece"), family="bert", seq_len=64)
    texts = [text.replace("[MASK]", "old") for text in TEXTS]  # a pipeline makes tokens of text
    theirs = pipeline(task.pipeline, model=model, tokenizer=tokenizer("wordpiece"))(texts)
    for ours, (theirs_TH,) in zip(answers(task, model, texts), theirs, strict=True):
        np.testing.assert_allclose(ours, theirs_TH, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_texts_go_on_as_in_transformers(family: str) -> None:
    how = {"max_new_tokens": 9, "num_beams": 2, "do_sample": False}
    wide = {"initializer_range": 0.2}
    task, model = load(
        "text_generation", tokenizer(), family=family, seq_len=64, model=wide, generation=how
    )
    texts = [
        "The old",
        "河水慢慢地流过",
        "def unbelievable(",
        "The river ran unbelievably slowly under the",
    ]
    use = pipeline(task.pipeline, model=model, tokenizer=tokenizer(), return_full_text=False, **how)
    got = answers(task, model, texts)
    assert got == [use(text)[0]["generated_text"] for text in texts] and len(set(got)) == 4
    assert answers(task, model, [""]) == [use("</s>")[0]["generated_text"]]


@pytest.mark.parametrize("name", ["text_generation", "instruction"])
def test_one_prompt_without_room_does_not_stop_the_others(name: str) -> None:
    """It is a bad example: what is wrong stands where its prediction would be."""
    long = {"id": "0", "prompt": "river " * 90}
    task, _ = load(name, tokenizer(), family="gpt2")
    with pytest.raises(BadExample, match="room for 63: shorten it, or set generation.truncate"):
        task.features(long)
    task, _ = load(name, tokenizer(), family="gpt2", generation={"truncate": True})
    assert task.features(long)


def test_an_encoder_is_not_asked_as_a_causal_model(tmp_path: Path) -> None:
    """What training refuses is refused by prediction, evaluation and the harness: a BERT sees what
    it is to say.
    """
    words, how = tokenizer(), {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), intermediate_size=16, **how)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    asked: Any = {"task": None, "data": "x.jsonl", "out": tmp_path / "x", "overrides": []}
    for task in ("text_generation", "instruction", "translation"):
        prompt = ['prompt="{source} ="'] if task == "translation" else []
        said = asked | {"task": task, "overrides": ["data.max_length=16", *prompt]}
        with pytest.raises(ConfigError, match="sees the future"):
            open_task(settle(find(tmp_path), **said))


def test_there_is_nothing_to_train() -> None:
    task, _ = load("fill_mask", tokenizer(), family="bert")
    with pytest.raises(ConfigError, match="(?s)only predicts.*value:  'fill_mask'"):
        task.facts(task.options, [])
