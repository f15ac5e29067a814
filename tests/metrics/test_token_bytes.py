"""The bytes that ids stand for are those of the text, however rows cut it; where that cannot be
known there is no figure.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from hfscale.errors import DataError
from hfscale.metrics.token_bytes import TokenBytes
from tests.objectives.tokenizers import TEXTS, tokenizer


def sentencepiece() -> Any:
    """A BPE as of Llama 2: a space before each text, and bytes for what it has no piece for."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeh", "桥"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("made", [tokenizer("bpe"), sentencepiece()], ids=["bpe", "sentencepiece"])
@pytest.mark.parametrize("length", [5, 7, 64])
def test_rows_of_any_length_have_the_bytes_of_the_texts(made: Any, length: int) -> None:
    """Each token is scored once, as the label of one row; characters are cut between rows."""
    texts, ids = [*TEXTS[:3], "  abc 🙂🙂 桥"], [made.eos_token_id]
    for text in texts:
        ids += [*made(text, add_special_tokens=False)["input_ids"], made.eos_token_id]
    counted, table = 0, TokenBytes(made, end_id=made.eos_token_id)
    for start in range(0, len(ids) - 1, length):
        row = np.array(ids[start : start + length + 1])
        size = table.of(row, np.arange(len(row)) > 0)
        assert size is not None
        counted += size
    assert counted == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_tokenizers_that_lose_bytes_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="does not keep every byte"):
        TokenBytes(tokenizer(kind), end_id=0)


def test_a_tokenizer_that_lowers_letters_is_refused_and_special_tokens_count_as_spelled() -> None:
    made = copy.deepcopy(tokenizer("bpe"))
    row = np.array([made.eos_token_id, made.mask_token_id, made.eos_token_id])
    assert TokenBytes(made, end_id=made.eos_token_id).of(row, np.array([False, True, True])) == len(
        "[MASK]"
    )
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match="Lowercase"):
        TokenBytes(made, end_id=made.eos_token_id)
    assert json.loads(made.backend_tokenizer.to_str())["normalizer"]["type"] == "Lowercase"


def test_an_unknown_token_has_no_bytes() -> None:
    made = tokenizer("bpe")
    row = np.array([made.eos_token_id, made.unk_token_id])
    assert TokenBytes(made, end_id=made.eos_token_id).of(row, np.array([False, True])) is None
