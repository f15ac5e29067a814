"""Answers do not depend on the texts beside them, also where an architecture mixes padding in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSequenceClassification

from hfscale.config.schema import Named
from hfscale.engine.inference import InferenceEngine
from hfscale.objectives.base import Setting
from hfscale.tasks.padding import reads_padding
from hfscale.tasks.table import load_task
from hfscale.training.predictor import predict
from tests.objectives.tokenizers import tokenizer as make_tokenizer

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
BART |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
    "convbert": {**SMALL, "embedding_size": 32},
    "fnet": SMALL,
    "bert": SMALL,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "bart": BART,
}


def classifier(
    architecture: str, vocab_size: int, head: Any = AutoModelForSequenceClassification
) -> Any:
    torch.manual_seed(1)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = CONFIG_MAPPING[architecture](
        vocab_size=vocab_size, initializer_range=0.3, **ids, **SIZES[architecture]
    )
    return head.from_config(config).eval()


@pytest.mark.parametrize(
    ("architecture", "reads"),
    [
        ("xlnet", True),
        ("convbert", True),
        ("fnet", True),
        ("bert", False),
        ("distilbert", False),
        ("gpt2", False),
        ("bart", False),
    ],
)
def test_what_reads_padding_is_found(architecture: str, reads: bool) -> None:
    assert reads_padding(classifier(architecture, 100), pad_id=0, device="cpu") is reads


@pytest.mark.parametrize("architecture", ["xlnet", "fnet"])
def test_an_answer_is_that_of_its_text_alone(architecture: str) -> None:
    tokenizer = make_tokenizer("wordpiece")
    model = classifier(architecture, len(tokenizer))
    facts = {"problem": "single_label_classification", "labels": ["a", "b"]}
    setting = Setting(seq_len=48, tokenizer=tokenizer, model_config=model.config, facts=facts)
    task = load_task(Named(name="sequence_classification"), setting)
    engine = InferenceEngine(model)
    task.check(engine, device="cpu")
    examples = [{"id": n, "text": "the river " * n} for n in (1, 3, 3, 2, 7)]
    alone = predict(task, engine, examples, batch=1)
    together = predict(task, engine, examples, batch=8)
    assert alone is not None and together is not None
    for one, other in zip(alone, together, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)


def test_a_vector_is_that_of_its_text_alone() -> None:
    """Of an architecture without a mask, too: embeddings look at padding as all tasks do."""
    tokenizer = make_tokenizer("wordpiece")
    model = classifier("fnet", len(tokenizer), AutoModel)
    setting = Setting(seq_len=48, tokenizer=tokenizer, model_config=model.config)
    task = load_task(Named(name="embedding", options={"pooling": "mean"}), setting)
    engine = InferenceEngine(model)
    task.check(engine, device="cpu")
    examples = [{"id": n, "text": "the river " * n} for n in (1, 3, 3, 2, 7)]
    alone = predict(task, engine, examples, batch=1)
    together = predict(task, engine, examples, batch=8)
    assert alone is not None and together is not None
    for one, other in zip(alone, together, strict=True):
        assert one["prediction"] == pytest.approx(other["prediction"], abs=1e-5)
