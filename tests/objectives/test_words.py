"""Where words begin, in three kinds of tokenizers and two kinds of scripts."""

from __future__ import annotations

import pytest

from hfscale.objectives.words import word_starts
from tests.objectives.tokenizers import tokenizer


def words(kind: str, text: str) -> list[str]:
    """Return the words that the table cuts ``text`` into, without spaces."""
    made = tokenizer(kind)
    ids = made(text, add_special_tokens=False)["input_ids"]
    starts = word_starts(made)[ids]
    starts[0] = True
    groups: list[list[int]] = []
    for number, start in zip(ids, starts, strict=True):
        if start:
            groups.append([])
        groups[-1].append(number)
    return [made.decode(group).strip().lower() for group in groups]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_a_word_is_whole_however_many_pieces_it_has(kind: str) -> None:
    made = tokenizer(kind)
    text = "the rivers slowly under"
    assert len(made(text, add_special_tokens=False)["input_ids"]) > 4
    assert words(kind, text) == ["the", "rivers", "slowly", "under"]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_in_chinese_words_begin_at_characters_and_never_inside_one(kind: str) -> None:
    found = words(kind, "河水流过城里的桥")
    assert "".join(found) == "河水流过城里的桥", found
    assert len(found) >= 4, found
