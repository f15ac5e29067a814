"""Where words begin, as a table over the vocabulary: for whole-word masking in any language.

WordPiece marks what continues a word (``##``); SentencePiece and byte-level BPE mark what begins
one. Scripts without spaces have no marks: there each character begins a word, as in BERT's own
treatment of Chinese.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Thai, Lao, Khmer, Burmese, kana, Han (with its extensions): written without spaces
# how byte-level tokenizers write the first byte of kana and Han, which may stand alone
_HAN_LEADS = "ãäåæçèé"
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    r"\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def word_starts(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return whether each id (V; bool) begins a word wherever it stands. Special tokens do."""
    kind = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"]
    vocabulary = tokenizer.get_vocab()
    byte_level = any("Ġ" in token for token in vocabulary)
    starts = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
    for token, number in vocabulary.items():
        if kind == "WordPiece":
            starts[number] = not token.startswith("##")
        elif byte_level:
            starts[number] = (token != "" and token[0] in _HAN_LEADS) or _begins(
                tokenizer.convert_tokens_to_string([token])
            )
        else:
            starts[number] = token.startswith("▁") or _begins(token)
    starts[tokenizer.all_special_ids] = True
    return starts


def _begins(text: str) -> bool:
    """Return whether a piece of text begins a word by itself: a space, a punctuation mark, a
    character of an unspaced script.

    Part of a character (U+FFFD) belongs to what came before.
    """
    first = text[:1]
    return not (first.isalnum() or first == "\ufffd" or first == "") or bool(_UNSPACED.match(first))
