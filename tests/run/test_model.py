"""MODEL by name: what it is, what it is for, and that whoever asks a live one is told what training
would say.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PretrainedConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hfscale.config.inference import Inference
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World
from hfscale.errors import ConfigError, DataError
from hfscale.jobs import harness, shards
from hfscale.jobs.asked import settle
from hfscale.jobs.predict import open_task
from hfscale.run.model import find
from hfscale.tokenizer import load_tokenizer
from tests.objectives.tokenizers import tokenizer as make_tokenizer

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}


def saved(folder: Path, kind: type[Any], config: PretrainedConfig, words: Any) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def gpt2(folder: Path, words: Any, vocab_size: int = 0) -> Path:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64}
    config = GPT2Config(vocab_size=vocab_size or len(words), **sizes)
    return saved(folder, GPT2LMHeadModel, config, words)


def task_of(folder: Path, task: str | None, *overrides: str) -> Any:
    said = {"task": task, "data": "x.jsonl", "out": folder / "x", "overrides": [*overrides]}
    return open_task(settle(find(folder), **said))


def test_marian_translates_and_is_asked_for_likelihoods(tmp_path: Path) -> None:
    words = make_tokenizer()
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 16)
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "decoder_vocab_size": len(words)}
    config = MarianConfig(vocab_size=len(words), **ids, **sizes)
    model = find(saved(tmp_path, MarianMTModel, config, words))
    assert model.purpose is not None and model.purpose.auto_model == "AutoModelForSeq2SeqLM"
    engine = model.engine(model.purpose.auto_model, Inference())
    assert isinstance(engine.module, MarianMTModel)


def test_a_bert_that_sees_the_future_has_no_perplexity(corpus: Path, tmp_path: Path) -> None:
    """Neither on shards nor in the harness."""
    words = load_tokenizer(corpus / "tokenizer")
    folder = saved(tmp_path, BertLMHeadModel, BertConfig(vocab_size=len(words), **TINY), words)
    config = shards.settle(find(folder), str(corpus / "shards" / "validation"), ["data.seq_len=32"])
    with pytest.raises(ConfigError, match="sees the future"):
        shards.run(config, World(), StopRequest())
    model = find(folder)
    engine = model.engine("AutoModelForCausalLM", Inference())
    make = partial(harness._Writing, "AutoModelForCausalLM")
    with pytest.raises(ConfigError, match="sees the future"):
        model.objective(make, harness.Setting(seq_len=harness.PROBED), engine)


def test_masks_are_not_filled_by_a_model_that_sees_only_the_past(tmp_path: Path) -> None:
    words = make_tokenizer("wordpiece")
    config = BertConfig(vocab_size=len(words), is_decoder=True, **TINY)
    folder = saved(tmp_path, BertForMaskedLM, config, words)
    with pytest.raises(ConfigError, match="sees only the past"):
        task_of(folder, None, "data.max_length=16")


def test_rows_that_the_model_cannot_read_are_refused(corpus: Path, tmp_path: Path) -> None:
    folder = gpt2(tmp_path, load_tokenizer(corpus / "tokenizer"))
    held_out = str(corpus / "shards" / "validation")
    config = shards.settle(find(folder), held_out, [])
    assert config.data.seq_len == 64
    config = shards.settle(find(folder), held_out, ["data.seq_len=128"])
    with pytest.raises(ConfigError, match="(?s)longer than the model can read.*data.seq_len=64"):
        shards.run(config, World(), StopRequest())
    with pytest.raises(ConfigError, match="(?s)longer than the model can read.*data.max_length=64"):
        task_of(folder, None, "data.max_length=128")


def test_shards_with_ids_that_the_model_does_not_know_are_refused(
    corpus: Path, tmp_path: Path
) -> None:
    words = load_tokenizer(corpus / "tokenizer")
    folder = gpt2(tmp_path, words, vocab_size=len(words) // 2)
    with pytest.raises(DataError, match="ids that the model does not have"):
        shards.settle(find(folder), str(corpus / "shards" / "validation"), [])


def test_a_model_of_pictures_is_not_asked_as_one_of_text(tmp_path: Path) -> None:
    words = make_tokenizer()
    text = TINY | {"vocab_size": len(words), "num_key_value_heads": 1, "head_dim": 8}
    seen = TINY | {"image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=seen, mm_tokens_per_image=4)
    folder = saved(tmp_path, Gemma3ForConditionalGeneration, config, words)
    assert find(folder).purpose is None
    with pytest.raises(ConfigError, match="reads more than text"):
        task_of(folder, "text_generation", "data.max_length=16")


def test_positions_that_count_from_no_padding_token_are_refused(tmp_path: Path) -> None:
    words = make_tokenizer()
    config = RobertaConfig(vocab_size=len(words), **TINY)
    folder = saved(tmp_path, RobertaForSequenceClassification, config, words)
    config.pad_token_id = None
    config.save_pretrained(folder)
    with pytest.raises(ConfigError, match="counts positions from a padding token"):
        task_of(folder, None, "data.max_length=16")
