"""Causal language modelling: every token is predicted from those before it.

    loss = - sum over t of log p(x_{t+1} | x_1 .. x_t)  /  number of predicted tokens

Shape legend: B rows, T = ``seq_len`` tokens, V vocabulary. A row of the stream holds T + 1 tokens:
inputs are the first T, labels the last T. Source: Radford et al. 2019, Language Models are
Unsupervised Multitask Learners, sec. 2. With ``cross_document`` a token sees whatever came before
it in its row, as in GPT-2 and Llama training. Without it a token sees its own document only,
positions start at 0 in each document, and no document is asked to predict the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfscale.objectives.base import Batch, Objective
from hfscale.objectives.cross_entropy import IGNORE_INDEX

if TYPE_CHECKING:
    from hfscale.stream.rows import Rows


class CausalLM(Objective):
    """GPT-like pretraining, for any architecture of ``AutoModelForCausalLM``."""

    causal = True
    frame = ()
    term = "clm"  # nats a predicted token

    def collate(self, rows: Rows) -> Batch:
        """Return inputs and next-token labels of the rows (B, T + 1); a filler row asks nothing."""
        inputs_BT, labels_BT = rows.ids_BL[:, :-1], rows.ids_BL[:, 1:]
        ignored_BT = ~rows.valid_B[:, None].expand_as(labels_BT)
        document_ids_BT = self.document_ids(rows)
        # no document predicts the next one
        if rows.boundaries is not None and document_ids_BT is not None:
            ignored_BT = (
                ignored_BT.reshape(-1).index_fill(0, rows.boundaries, True).view_as(labels_BT)
            )
        return Batch(
            inputs={"input_ids": inputs_BT},
            labels_BT=labels_BT.masked_fill(ignored_BT, IGNORE_INDEX),
            input_ids=inputs_BT,
            counts={"clm": (~ignored_BT).sum(1)},
            source_B=rows.source_B,
            position_B=rows.position,
            document_ids_BT=document_ids_BT,
        )
