"""Masked language modelling: some tokens are hidden, and predicted from both sides.

    loss = - sum over selected t of log p(x_t | corrupted row)  /  number of selected tokens

Shape legend: B rows, T = ``seq_len`` tokens, V vocabulary. The choice is drawn anew at every visit
of a row (dynamic masking, Liu et al. 2019, RoBERTa, sec. 4.1) from the seed and the row's place in
the run, so a resumed run masks alike. Sources: Devlin et al. 2019, BERT, sec. 3.1 (15 %; of those
80/10/10); Joshi et al. 2020, SpanBERT, sec. 3.1 (spans); whole words as in BERT's repository: all
pieces of a word or none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hfscale.config.section import Fraction, Section
from hfscale.errors import ConfigError
from hfscale.objectives.base import Batch, Model, Objective, Setting
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.objectives.draws import row_generators, special_id
from hfscale.objectives.words import word_starts

if TYPE_CHECKING:
    from hfscale.stream.rows import Rows

SPAN_P, LONGEST_SPAN = 0.2, 10  # SpanBERT: lengths are geometric, cut at 10 tokens; 3.8 on average


class MaskingOptions(Section):
    """How a row is corrupted. Fractions are of the tokens; what is neither masked nor random stays
    as it is.
    """

    select: Annotated[float, Field(gt=0, lt=1)] = 0.15  # of the tokens that are not special
    as_mask: Fraction = 0.80  # of the selected
    as_random: Fraction = 0.10  # of the selected
    units: Literal["token", "word", "span"] = "token"  # what is selected as a whole


class MaskedLM(Objective):
    """BERT-like pretraining, for any architecture of ``AutoModelForMaskedLM``."""

    Options = MaskingOptions
    auto_model = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    frame = ("cls_token", "eos_token")
    options: MaskingOptions

    def __init__(self, options: Section, setting: Setting) -> None:
        super().__init__(options, setting)
        assert isinstance(options, MaskingOptions)
        if options.as_mask + options.as_random > 1:
            raise ConfigError(
                "as_mask and as_random are parts of what is selected",
                where="objective.options",
                value=options.as_mask + options.as_random,
                remedy="give two fractions whose sum is at most 1",
            )
        if options.select * setting.seq_len < 1:
            raise ConfigError(
                "rows are too short to mask",
                where="data.seq_len",
                value=setting.seq_len,
                remedy=f"at objective.options.select={options.select} give at least "
                f"{int(1 / options.select) + 1}",
            )
        tokenizer = setting.tokenizer
        self._mask_id = special_id(tokenizer, "mask_token", why="which stands for hidden tokens")
        self._cls_id = tokenizer.cls_token_id
        self._ordinary = np.ones(len(tokenizer), dtype=bool)
        self._ordinary[tokenizer.all_special_ids] = False
        self._ordinary_ids = np.flatnonzero(self._ordinary)
        self._starts = word_starts(tokenizer) if options.units == "word" else None

    def weights(self) -> dict[str, float]:
        """Return ``mlm`` (nats a selected token) and ``masked_accuracy``, which is reported
        only.
        """
        return {"mlm": 1.0, "masked_accuracy": 0.0}

    def collate(self, rows: Rows) -> Batch:
        """Return the corrupted rows (B, T) and their answers; the first token gives its place to
        [CLS] where the tokenizer has one.
        """
        ids_BT = rows.ids_BL[:, :-1]
        inputs_BT, labels_BT = ids_BT.clone(), torch.full_like(ids_BT, IGNORE_INDEX)
        if self._cls_id is not None:
            inputs_BT[:, 0] = self._cls_id
        for k, rng in enumerate(row_generators(self.setting.seed, rows.position)):
            if rows.valid_B[k]:
                self.corrupt(inputs_BT[k].numpy(), labels_BT[k].numpy(), rng)
        asked_B = (labels_BT != IGNORE_INDEX).sum(1)
        return Batch(
            inputs={"input_ids": inputs_BT},
            labels_BT=labels_BT,
            input_ids=ids_BT,
            source_B=rows.source_B,
            position_B=rows.position,
            counts={"mlm": asked_B, "masked_accuracy": asked_B},
            document_ids_BT=self.document_ids(rows),
        )

    def corrupt(self, ids_T: np.ndarray, labels_T: np.ndarray, rng: np.random.Generator) -> None:
        """Return with tokens of ``ids_T`` hidden, and what they were in ``labels_T``."""
        T, options = len(ids_T), self.options
        if self._starts is not None:
            begins_T = self._starts[ids_T]
            begins_T[1:] |= ~self._ordinary[ids_T[:-1]]
            unit_T = np.cumsum(begins_T)
        elif options.units == "span":
            unit_T = np.repeat(np.arange(T), np.minimum(rng.geometric(SPAN_P, T), LONGEST_SPAN))[:T]
        else:
            unit_T = np.arange(T)
        selected_T = (rng.random(T + 1) < options.select)[unit_T] & self._ordinary[ids_T]
        # a span is hidden in one way
        fate_T = rng.random(T + 1)[unit_T if options.units == "span" else np.arange(T)]
        labels_T[selected_T] = ids_T[selected_T]
        random_T = (
            selected_T
            & (fate_T >= options.as_mask)
            & (fate_T < options.as_mask + options.as_random)
        )
        ids_T[selected_T & (fate_T < options.as_mask)] = self._mask_id
        ids_T[random_T] = rng.choice(self._ordinary_ids, int(random_T.sum()))

    def loss(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Return the sums_B of ``mlm`` in nats and of right guesses."""
        scores = self.scores(model, batch, guesses=True)
        assert scores.right_BT is not None, "they were wanted"
        return {"mlm": scores.losses_BT.sum(1), "masked_accuracy": scores.right_BT.sum(1)}
