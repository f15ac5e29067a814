"""Sequence-to-sequence pretraining: a row is corrupted, and the decoder gives back what is missing
(T5) or all of it (BART).

    loss = - sum over t of log p(y_t | y_1 .. y_{t-1}, corrupted row)  /  number of target tokens

Shape legend: B rows, T = ``seq_len`` tokens of text, S tokens into the encoder, U out of the
decoder. The number of hidden tokens and of spans is the same for every row, so S and U are too and
nothing is padded. Worked example, T = 10, 2 spans of 3 hidden tokens:

    text        a b c d e f g h i j
    t5    in    a b <0> e f g <1> i j </s>      out   <0> c d <1> h </s>
          S = 10 - 3 + 2 + 1, U = 3 + 2 + 1
    bart  in    a b <mask> e f g <mask> i j     out   a b c d e f g h i j
          S = 10 - 3 + 2, U = 10

Sources: Raffel et al. 2020, T5, sec. 3.1.4 and 3.3.4 (span corruption: 15 %, mean length 3); Lewis
et al. 2020, BART, sec. 2.2 (text infilling: 30 %, lengths Poisson(3), so a span may be empty).
Poisson lengths with a known sum are multinomial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from hfscale.config.section import Section
from hfscale.errors import ConfigError
from hfscale.objectives.base import Batch, Objective, Setting
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.objectives.draws import lacking, row_generators, special_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfscale.stream.rows import Rows

HIDDEN = {"t5": 0.15, "bart": 0.30}  # of the text, unless the options say otherwise


class DenoisingOptions(Section):
    """How text is corrupted."""

    noise: Literal["t5", "bart"] = "t5"
    hidden: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # part of the tokens; default 0.15 for t5, 0.3 for bart
    )
    span: Annotated[float, Field(ge=1)] = 3.0  # hidden tokens of a span, on average


class Seq2Seq(Objective):
    """T5- and BART-like pretraining, for any architecture of ``AutoModelForSeq2SeqLM``."""

    Options = DenoisingOptions
    auto_model = "AutoModelForSeq2SeqLM"
    pipeline = None  # transformers 5 has none for these models
    term = "seq2seq"  # nats a target token
    options: DenoisingOptions

    def __init__(self, options: Section, setting: Setting) -> None:
        super().__init__(options, setting)
        assert isinstance(options, DenoisingOptions)
        if not setting.cross_document:
            raise ConfigError(
                "seq2seq cannot keep documents apart: the decoder looks at the whole row",
                where="data.cross_document",
                value=False,
                remedy="set data.cross_document=true",
            )
        T, tokenizer = setting.seq_len, setting.tokenizer
        self._hidden = round(T * (options.hidden or HIDDEN[options.noise]))
        self._spans = round(self._hidden / options.span)
        if not 1 <= self._spans < T - self._hidden:
            raise ConfigError(
                "rows are too short for spans to be hidden",
                where="data.seq_len",
                value=T,
                remedy=f"that is {self._hidden} tokens in {self._spans} spans: give longer "
                "rows, or change hidden or span",
            )
        if options.noise == "bart":
            self._marks = np.full(
                self._spans,
                special_id(tokenizer, "mask_token", why="which stands for hidden spans"),
            )
            self._end, self.frame = np.empty(0, np.int64), ()
        else:
            self._marks, self.frame = sentinels(tokenizer, self._spans), (None, "eos_token")
            self._end = np.array(
                [special_id(tokenizer, "eos_token", why="which ends inputs and targets")]
            )

    def collate(self, rows: Rows) -> Batch:
        """Return encoder inputs (B, S), decoder inputs and labels (B, U) of the rows; a filler row
        asks nothing.
        """
        config = self.setting.model_config
        ids_BT = rows.ids_BL[:, :-1]
        generators = row_generators(self.setting.seed, rows.position)
        pairs = [
            self.corrupt(ids_T, rng) for ids_T, rng in zip(ids_BT.numpy(), generators, strict=True)
        ]
        inputs_BS, labels_BU = (
            torch.from_numpy(np.stack(column)) for column in zip(*pairs, strict=True)
        )
        decoder_BU = labels_BU.roll(1, 1)
        decoder_BU[:, 0] = (config and config.decoder_start_token_id) or 0
        labels_BU.masked_fill_(~rows.valid_B[:, None], IGNORE_INDEX)
        return Batch(
            inputs={"input_ids": inputs_BS, "decoder_input_ids": decoder_BU},
            labels_BT=labels_BU,
            input_ids=ids_BT,
            counts={"seq2seq": (labels_BU != IGNORE_INDEX).sum(1)},
            source_B=rows.source_B,
            position_B=rows.position,
        )

    def corrupt(self, ids_T: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return what the encoder sees (S) and what the decoder has to say (U)."""
        T, spans = len(ids_T), self._spans
        if self.options.noise == "bart":
            lengths = rng.multinomial(self._hidden, np.full(spans, 1 / spans))
            # kept text before, between and after; may be empty
            gaps = _parts(T - self._hidden + spans + 1, spans + 1, rng) - 1
        else:
            lengths = _parts(self._hidden, spans, rng)
            gaps = _parts(T - self._hidden + 1, spans + 1, rng)
            gaps[-1] -= 1  # text begins with a kept token, and may end with a hidden span
        starts = np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths
        kept, hidden = [], []
        at = 0
        for mark, start, length in zip(self._marks, starts, lengths, strict=True):
            kept += [ids_T[at:start], [mark]]
            hidden += [[mark], ids_T[start : start + length]]
            at = start + length
        inputs_S = np.concatenate([*kept, ids_T[at:], self._end])
        return inputs_S, ids_T if self.options.noise == "bart" else np.concatenate(
            [*hidden, self._end]
        )


def sentinels(tokenizer: PreTrainedTokenizerBase, count: int) -> np.ndarray:
    """Return the ids of ``<extra_id_0>``, ``<extra_id_1>``, ..., which stand for the spans in their
    order.

    Raises:
        ConfigError: if the tokenizer has fewer, with the command that adds them.
    """
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary.get(f"<extra_id_{number}>") for number in range(count)]
    if None in ids:
        raise lacking(
            tokenizer,
            f"this tokenizer has {ids.index(None)} sentinel tokens (<extra_id_0>, ...), a "
            f"row needs {count}",
            add=f"sentinels={max(100, count)}",
        )
    return np.array(ids)


def _parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``count`` lengths of at least 1 that sum to ``total``, every composition equally
    likely.
    """
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
