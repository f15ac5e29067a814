"""A tokenizer leaves as transformers 5 and 4 read it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from hfscale.tokenizer import save_tokenizer, tokenizer_digest
from tests.helpers.labelled import words_tokenizer


def test_a_saved_tokenizer_names_a_class_that_both_versions_have(tmp_path: Path) -> None:
    """transformers 4 knows no TokenizersBackend, and takes a mapping for special tokens of no role
    (tried with 4.57.6).
    """
    tokenizer = words_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})  # type: ignore[dict-item]
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    save_tokenizer(tokenizer, tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["model_input_names"] == ["input_ids", "attention_mask"]
    assert said["additional_special_tokens"] == ["<|user|>"] and "extra_special_tokens" not in said
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "the lovely film <|user|> was"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == "the lovely film was"
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
