"""Model configs: what is accepted, and what is refused with which remedy."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hfscale.config.schema import Model
from hfscale.errors import ConfigError
from hfscale.models.build import build_model, check_model_config, special_ids
from tests.models.families import FAMILIES, VOCAB

TINY = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}


def check(**model: Any) -> Any:
    return check_model_config(Model(**model), vocab_size=VOCAB, seq_len=32)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"architecture": "gtp2"}, "did you mean gpt2"),
        ({"architecture": "gpt2", "config": {"n_layers": 3}}, "did you mean n_layer"),
        ({"architecture": "gpt2", "config": {"n_layer": "three"}}, "n_layer"),
        ({"architecture": "gpt2", "config": {"vocab_size": 319}}, "at least 320"),
        (
            {"architecture": "gpt2", "config": {"n_positions": 16}},
            "model.config.n_positions=32, or data.seq_len=16",
        ),
        (
            {"architecture": "roberta", "config": {"max_position_embeddings": 33}},
            "max_position_embeddings=34, or data.seq_len=31",
        ),
        ({}, "model.architecture"),
        ({"pretrained": "no/such-folder/at-all"}, "model.pretrained"),
    ],
)
def test_a_bad_config_is_refused_with_a_remedy(model: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match="where:") as error:
        check(**model)
    assert says in str(error.value)


def test_sizes_that_cannot_be_built_are_the_users_error() -> None:
    model = Model(architecture="gpt2", config={"n_head": 0})
    with pytest.raises(ConfigError, match=r"ZeroDivisionError[\s\S]*where:  model"):
        build_model(model, auto_model="AutoModelForCausalLM", vocab_size=VOCAB, seq_len=32, seed=1)


@pytest.mark.parametrize(
    ("model", "auto_model", "says"),
    [
        (
            {"architecture": "gpt2", "config": {**TINY, "n_head": 5}},
            "AutoModelForCausalLM",
            "divisible",
        ),
        ({"architecture": "t5"}, "AutoModelForCausalLM", "AutoModelForCausalLM"),
        (
            {"architecture": "bloom", "attention": "sdpa"},
            "AutoModelForCausalLM",
            "model.attention=auto",
        ),
    ],
)
def test_what_transformers_refuses_is_a_config_error(
    model: dict[str, Any], auto_model: str, says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(Model(**model), auto_model=auto_model, vocab_size=VOCAB, seq_len=32, seed=0)
    assert says in str(error.value)


def test_the_vocabulary_is_the_tokenizers_unless_the_config_has_room_for_more() -> None:
    assert check(architecture="gpt2").vocab_size == VOCAB
    assert check(architecture="gpt2", config={"vocab_size": 384}).vocab_size == 384


@pytest.mark.parametrize(("positions", "refused"), [(127, True), (128, False), (20, True)])
def test_a_table_of_positions_that_begins_behind_the_padding_id(
    positions: int, refused: bool
) -> None:
    """M2M-100 adds two rows to its table of sinusoids; before, an IndexError said nothing of the
    padding id.
    """
    model = Model(architecture="m2m_100", config={"max_position_embeddings": positions})

    def made() -> Any:
        return check_model_config(
            model, vocab_size=VOCAB, seq_len=32, overrides={"pad_token_id": 97}
        )

    if refused:
        with pytest.raises(ConfigError, match=r"from its padding id, 97[\s\S]*embeddings=128"):
            made()
    else:
        assert made().pad_token_id == 97


def test_relative_positions_have_no_limit() -> None:
    assert (
        check_model_config(Model(architecture="t5"), vocab_size=VOCAB, seq_len=100_000).model_type
        == "t5"
    )


def test_overrides_replace_defaults_and_the_config_replaces_both() -> None:
    model = Model(architecture="gpt2", config={"eos_token_id": 7})
    config = check_model_config(
        model,
        vocab_size=VOCAB,
        seq_len=32,
        overrides={"bos_token_id": 3, "eos_token_id": 3, "no_such_key": 1},
    )
    assert (config.bos_token_id, config.eos_token_id) == (3, 7)


def test_padding_that_is_another_token_is_not_the_models_padding() -> None:
    def ids(bos: int | None, eos: int, pad: int) -> dict[str, int | None]:
        return special_ids(
            SimpleNamespace(
                bos_token_id=bos,
                eos_token_id=eos,
                pad_token_id=pad,
                cls_token_id=None,
                sep_token_id=None,
            )
        )

    assert ids(0, 0, 0)["pad_token_id"] is None and ids(0, 0, 0)["decoder_start_token_id"] == 0
    assert ids(None, 0, 2)["pad_token_id"] == ids(None, 0, 2)["decoder_start_token_id"] == 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_first_loss_is_that_of_guessing(family: str) -> None:
    auto_model, model = FAMILIES[family]
    built = build_model(model, auto_model=auto_model, vocab_size=VOCAB, seq_len=32, seed=0)
    assert built.training
    ids = torch.randint(VOCAB, (4, 33))
    loss = torch.nn.functional.cross_entropy(
        built(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()
    )
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.1)


def test_a_pretrained_folder_gives_the_config(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**TINY, vocab_size=VOCAB)).save_pretrained(tmp_path)
    config = check(pretrained=str(tmp_path), config={"resid_pdrop": 0.0})
    assert (config.n_embd, config.resid_pdrop) == (32, 0.0)
    with pytest.raises(ConfigError, match="resid_pdrop"):
        check(pretrained=str(tmp_path), config={"resid_drop": 0.0})


@pytest.mark.parametrize(("pad", "trained"), [(2, True), (5, False)])
def test_a_padding_token_that_stands_in_texts_is_trained(pad: int, trained: bool) -> None:
    config = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "eos_token_id": [2, 3],
        "pad_token_id": pad,
        "tie_word_embeddings": False,
    }
    model = build_model(
        Model(architecture="llama", config=config),
        auto_model="AutoModelForCausalLM",
        vocab_size=VOCAB,
        seq_len=32,
        seed=0,
    )
    ids = torch.tensor([[2, 5, 7, 9]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert bool(model.model.embed_tokens.weight.grad[pad].any()) == trained
    assert model.config.pad_token_id == pad
