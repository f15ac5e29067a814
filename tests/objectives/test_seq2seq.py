"""Span corruption and text infilling: nothing is lost, lengths are fixed, spans are as long as the
papers say.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hfscale.config.schema import Named
from hfscale.errors import ConfigError
from hfscale.objectives.base import Objective, Setting, load_objective
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.objectives.seq2seq import sentinels
from hfscale.stream.rows import Rows
from tests.objectives.tokenizers import tokenizer

T = 200


def corruption(noise: str, **options: object) -> Objective:
    return load_objective(
        Named(name="seq2seq", options={"noise": noise, **options}),
        Setting(seq_len=T, seed=3, tokenizer=tokenizer()),
    )


def rows_of(count: int, *, first: int = 0) -> Rows:
    ids_BL = torch.randint(
        60, 300, (first + count, T + 1), generator=torch.Generator().manual_seed(1)
    )[first:]
    return Rows(
        ids_BL,
        None,
        torch.ones(count, dtype=torch.bool),
        torch.zeros(count, dtype=torch.int16),
        torch.arange(first, first + count),
    )


def put_back(inputs: list[int], target: list[int], marks: set[int]) -> list[int]:
    """Return the text that T5 inputs and targets stand for: every mark replaced by what follows it
    in the target.
    """
    spans: dict[int, list[int]] = {}
    for number in target[:-1]:
        if number in marks:
            spans[number] = current = []
        else:
            current.append(number)
    return [
        number for piece in inputs[:-1] for number in (spans[piece] if piece in marks else [piece])
    ]


def test_t5_inputs_and_targets_hold_the_whole_text_and_are_of_one_length() -> None:
    rows, objective = rows_of(200), corruption("t5")
    batch = objective.collate(rows)
    marks = sentinels(tokenizer(), 10)
    eos = tokenizer().eos_token_id
    assert batch.inputs["input_ids"].shape == (200, T - 30 + 10 + 1) and batch.labels_BT.shape == (
        200,
        30 + 10 + 1,
    )
    for ids, inputs, target in zip(
        rows.ids_BL[:, :-1].tolist(),
        batch.inputs["input_ids"].tolist(),
        batch.labels_BT.tolist(),
        strict=True,
    ):
        assert put_back(inputs, target, set(marks.tolist())) == ids
        assert [number for number in inputs if number in marks] == marks.tolist()  # in order
        assert inputs[-1] == target[-1] == eos
    assert torch.equal(batch.inputs["decoder_input_ids"][:, 1:], batch.labels_BT[:, :-1])
    lengths = np.diff(np.flatnonzero(np.isin(batch.labels_BT.numpy().ravel(), marks)))
    assert lengths.min() == 2 and len(set(lengths.tolist())) > 5, (
        "spans differ in length, and none is empty"
    )


def test_bart_hides_poisson_spans_behind_one_mask_each_and_asks_for_everything() -> None:
    rows, objective = rows_of(300), corruption("bart")
    batch = objective.collate(rows)
    mask = tokenizer().mask_token_id
    assert batch.inputs["input_ids"].shape == (300, T - 60 + 20)
    assert torch.equal(batch.labels_BT, rows.ids_BL[:, :-1])
    hidden: list[int] = []
    for ids, inputs in zip(
        rows.ids_BL[:, :-1].tolist(), batch.inputs["input_ids"].tolist(), strict=True
    ):
        assert inputs.count(mask) == 20
        kept = [number for number in inputs if number != mask]
        at = iter(ids)
        assert all(number in at for number in kept), "what is kept stands in the order of the text"
    rng = np.random.default_rng(0)
    for _ in range(300):
        hidden += rng.multinomial(60, np.full(20, 1 / 20)).tolist()
    # as Poisson(3)
    assert np.mean(hidden) == pytest.approx(3.0) and np.var(hidden) == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize(
    ("noise", "hidden", "span"),
    [("t5", None, 3), ("t5", 0.5, 4.5), ("bart", None, 3), ("bart", 0.15, 1)],
)
def test_nothing_is_padded_whatever_is_drawn(noise: str, hidden: float | None, span: float) -> None:
    """Every row has as many hidden tokens and spans, so its lengths are known before anything is
    drawn: padding is 0 by design.
    """
    batch = corruption(noise, hidden=hidden, span=span).collate(rows_of(300))
    pad = tokenizer().pad_token_id
    assert all(
        isinstance(tensor, torch.Tensor) and not (tensor == pad).any()
        for tensor in batch.inputs.values()
    )
    assert (batch.labels_BT != IGNORE_INDEX).all(), "every place of the decoder asks something"


def test_a_row_is_corrupted_by_its_place_alone_and_filler_asks_nothing() -> None:
    for noise in ("t5", "bart"):
        whole = corruption(noise).collate(rows_of(6))
        part = corruption(noise).collate(rows_of(2, first=4))
        assert torch.equal(whole.inputs["input_ids"][4:], part.inputs["input_ids"])
        rows = rows_of(2)
        rows.valid_B[1] = False
        count = corruption(noise).collate(rows).counts["seq2seq"].tolist()
        assert count[0] > 0 and count[1] == 0


def test_what_cannot_be_corrupted_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"40 sentinel tokens.*needs 50(?s:.*)hfscale tokenizer add"
    ):
        load_objective(
            Named(name="seq2seq", options={"hidden": 0.5, "span": 2}),
            Setting(seq_len=T, tokenizer=tokenizer()),
        )
    with pytest.raises(ConfigError, match="too short for spans"):
        load_objective(Named(name="seq2seq"), Setting(seq_len=6, tokenizer=tokenizer()))
    with pytest.raises(ConfigError, match="cannot keep documents apart"):
        load_objective(
            Named(name="seq2seq"), Setting(seq_len=T, tokenizer=tokenizer(), cross_document=False)
        )
