"""Masking: the fractions, what is never touched, whole words and spans, and that a row is masked
alike whoever holds it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from hfscale.config.schema import Named
from hfscale.errors import ConfigError
from hfscale.objectives.base import Objective, Setting, load_objective
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.objectives.words import word_starts
from hfscale.stream.rows import Rows
from tests.objectives.tokenizers import TEXTS, tokenizer

T = 128


def masking(kind: str = "wordpiece", seed: int = 3, **options: object) -> Objective:
    return load_objective(
        Named(name="mlm", options=options), Setting(seq_len=T, seed=seed, tokenizer=tokenizer(kind))
    )


def text_rows(kind: str, count: int, *, first: int = 0) -> Rows:
    """Return rows of real text; row k is at position ``first + k``."""
    encode = tokenizer(kind)
    ids = [
        number
        for text in TEXTS
        for number in [*encode(text, add_special_tokens=False)["input_ids"], encode.sep_token_id]
    ]
    line = torch.tensor(ids * (count * T // len(ids) + 2))
    ids_BL = torch.stack([line[k * T : k * T + T + 1] for k in range(first, first + count)])
    return Rows(
        ids_BL,
        None,
        torch.ones(count, dtype=torch.bool),
        torch.zeros(count, dtype=torch.int16),
        torch.arange(first, first + count),
    )


def test_fifteen_percent_are_selected_and_of_those_80_10_10() -> None:
    rows, objective = text_rows("wordpiece", 600), masking()
    batch = objective.collate(rows)
    inputs, labels, ids = batch.inputs["input_ids"], batch.labels_BT, rows.ids_BL[:, :-1]
    made = tokenizer("wordpiece")
    special = torch.isin(ids, torch.tensor(made.all_special_ids))
    asked = labels != IGNORE_INDEX
    assert (labels[asked] == ids[asked]).all()
    assert not (asked & special)[:, 1:].any(), "special tokens are never hidden"
    assert (inputs[:, 0] == made.cls_token_id).all() and not asked[:, 0].any()
    untouched = ~asked
    untouched[:, 0] = False
    assert (inputs[untouched] == ids[untouched]).all()
    share = asked.sum() / (~special[:, 1:]).sum()
    assert share == pytest.approx(0.15, abs=0.005)
    masked = (inputs == made.mask_token_id)[asked].float().mean().item()
    kept = (inputs == ids)[asked].float().mean().item()
    assert masked == pytest.approx(0.80, abs=0.01)
    assert kept == pytest.approx(0.10 + 0.10 / 70, abs=0.01)  # a random token may be the same one
    assert not torch.isin(
        inputs[asked & (inputs != made.mask_token_id)], torch.tensor(made.all_special_ids)
    ).any()
    assert batch.counts["mlm"].tolist() == asked.sum(1).tolist()


def test_a_row_is_masked_by_its_place_and_seed_alone() -> None:
    whole = masking().collate(text_rows("wordpiece", 8)).inputs["input_ids"]
    parts = [
        masking().collate(text_rows("wordpiece", 2, first=first)).inputs["input_ids"]
        for first in (0, 2, 4, 6)
    ]
    assert torch.equal(whole, torch.cat(parts))
    again = text_rows("wordpiece", 8)
    again.position.add_(1000)  # the same text in another epoch
    assert not torch.equal(whole, masking().collate(again).inputs["input_ids"])
    assert not torch.equal(
        whole, masking(seed=4).collate(text_rows("wordpiece", 8)).inputs["input_ids"]
    )


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_a_word_is_hidden_whole_or_not_at_all(kind: str) -> None:
    rows = text_rows(kind, 100)
    asked = masking(kind, units="word").collate(rows).labels_BT != IGNORE_INDEX
    starts = word_starts(tokenizer(kind))
    longest = 0
    for ids, hidden in zip(rows.ids_BL[:, :-1].tolist(), asked.numpy()):
        begins = [
            0,
            *(
                t
                for t in range(1, T)
                if starts[ids[t]] or ids[t - 1] == tokenizer(kind).sep_token_id
            ),
            T,
        ]
        for begin, end in pairwise(begins[1:]):  # the first token of a row is [CLS]
            assert len(set(hidden[begin:end].tolist())) == 1
            longest = max(longest, end - begin)
    assert longest > 2, "no word had several pieces: nothing was tested"
    assert asked.float().mean() == pytest.approx(0.14, abs=0.03)


def test_spans_are_hidden_in_one_way_and_have_spanbert_lengths() -> None:
    rows = text_rows("bpe", 400)
    batch = masking("bpe", units="span").collate(rows)
    asked = (batch.labels_BT != IGNORE_INDEX).numpy()
    runs = [
        len(run) for row in asked for run in "".join(map(str, row.astype(int))).split("0") if run
    ]
    assert max(runs) <= 40 and np.mean(runs) > 2.5, np.mean(runs)
    assert asked.mean() == pytest.approx(0.15, abs=0.02)


def test_filler_rows_ask_nothing() -> None:
    rows = text_rows("wordpiece", 2)
    rows.valid_B[1] = False
    assert masking().collate(rows).counts["mlm"].tolist()[1] == 0


def test_what_cannot_be_masked_is_refused() -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, eos_token="</s>")
    with pytest.raises(ConfigError, match=r"no mask token.*(?s:.*)hfscale tokenizer add"):
        load_objective(Named(name="mlm"), Setting(seq_len=T, tokenizer=bare))
    with pytest.raises(ConfigError, match=r"too short to mask(?s:.*)at least 7"):
        load_objective(Named(name="mlm"), Setting(seq_len=5, tokenizer=tokenizer()))
    with pytest.raises(ConfigError, match="at most 1"):
        masking(as_mask=0.8, as_random=0.3)
