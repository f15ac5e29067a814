"""Text that spells a control token stays text, in every kind of tokenizer; only templates put
control tokens.
"""

from __future__ import annotations

from typing import Any

import pytest

from hfscale.control_tokens import NotText, Quoted, text_alone
from hfscale.encoding import encoder
from tests.objectives.tokenizers import SPECIAL, tokenizer

KINDS = ("bpe", "wordpiece", "unigram")
SPELLED = "the [MASK] of </s> and <extra_id_3>x[UNK]</s>old [SEP]"


def special_ids(tok: Any) -> set[int]:
    return {n for n, token in tok.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_hold_no_control_token_but_their_end(kind: str) -> None:
    tok = tokenizer(kind)
    encode = encoder(tok.backend_tokenizer.to_str(), eod_id=tok.eos_token_id, dtype="<u4")
    ids, plain = (part.tolist() for part in encode([SPELLED, "the old river"]))
    control = special_ids(tok) - {tok.unk_token_id}
    assert [number for number in ids if number in control] == [tok.eos_token_id]
    assert ids[-1] == tok.eos_token_id
    assert plain[:-1] == tok("the old river", add_special_tokens=False)["input_ids"]
    if kind == "bpe":
        assert tok.decode(ids[:-1]) == SPELLED


def test_a_run_that_began_before_goes_on_as_it_began() -> None:
    tok = tokenizer("bpe")
    json = tok.backend_tokenizer.to_str()
    (ids,) = encoder(json, eod_id=1, dtype="<u4", forged=True)(["the </s> river"])
    assert ids.tolist()[:-1] == tok("the </s> river", add_special_tokens=False)["input_ids"]
    assert tok.eos_token_id in ids.tolist()[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformers_tokenizer_takes_text_for_text_and_is_left_as_it_was(kind: str) -> None:
    tok = tokenizer(kind)
    before = tok.backend_tokenizer.to_str()
    with text_alone(tok, SPELLED):
        made = tok(SPELLED, add_special_tokens=False, return_offsets_mapping=True)
    control = special_ids(tok) - {tok.unk_token_id}
    assert not control & set(made["input_ids"])
    assert max(end for _, end in made["offset_mapping"]) == len(SPELLED)
    assert tok.backend_tokenizer.to_str() == before
    assert tok("</s>", add_special_tokens=False)["input_ids"][-1] == tok.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_template_puts_control_tokens(kind: str) -> None:
    tok = tokenizer(kind)
    quoted = Quoted(tok, SPELLED)
    made = quoted.ids(f"[CLS]{quoted.quote(SPELLED)}[SEP]", add_special_tokens=False)["input_ids"]
    control = special_ids(tok) - {tok.unk_token_id}
    ends = [tok.cls_token_id, tok.sep_token_id]
    assert [number for number in made if number in control] == ends
    if kind == "bpe":
        assert tok.decode(made[1:-1]) == SPELLED


def test_what_is_spelled_only_once_it_is_normalized_is_text_too() -> None:
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    tok = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer("unigram").backend_tokenizer).from_str(
            tokenizer("unigram").backend_tokenizer.to_str()
        ),
        **SPECIAL,
    )
    tok.backend_tokenizer.normalizer = normalizers.NFKC()
    wide = "the ＜/s＞ river"
    encode = encoder(tok.backend_tokenizer.to_str(), eod_id=tok.eos_token_id, dtype="<u4")
    assert tok.eos_token_id not in encode([wide])[0].tolist()[:-1]
    with text_alone(tok, wide):
        assert tok.eos_token_id not in tok(wide, add_special_tokens=False)["input_ids"]


def test_a_token_of_one_character_cannot_be_quoted() -> None:
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer("bpe").backend_tokenizer
    tok = PreTrainedTokenizerFast(tokenizer_object=type(backend).from_str(backend.to_str()))
    tok.add_special_tokens({"sep_token": "§"})
    with pytest.raises(NotText, match="'§'"):
        Quoted(tok, "see § 5").quote("see § 5")
