"""The rows of one step of a run, each as a batch of its own, cut into the documents that it is made
of: for whoever asks which of them is to blame (reports/incident.py).

Shape legend: L = ``seq_len``; a row of tokens has L + 1 of them. B is 1: a row is a batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from hfscale.checkpoint.state import CheckpointState
from hfscale.config.schema import TrainConfig
from hfscale.errors import DataError
from hfscale.objectives.base import Batch, Objective
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.reports.batch import Row
from hfscale.run.examples import ExampleData
from hfscale.run.run import Run
from hfscale.stream.examples import Examples
from hfscale.stream.rows import Rows
from hfscale.tasks.base import Task
from hfscale.tokenizer import end_of_document_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Part:
    """A document of a row, or a whole row: with nothing asked but what is in it."""

    position: int  # of the row, in the order of the run
    where: str  # it lies in the data, for people
    text: str
    batch: Batch


class StepRows(Protocol):
    """The rows of a step, by number from 0."""

    @property
    def objective(self) -> Objective:
        """What was trained on them."""

    def __len__(self) -> int: ...

    def batch(self, number: int) -> Batch:
        """Return a row as training had it, alone."""

    def parts(self, number: int) -> Sequence[Part]:
        """Return the parts of a row that can be blamed each for itself."""


class TokenRows:
    """Rows of shards or raw text, for an objective."""

    def __init__(
        self, rows: Sequence[Row], objective: Objective, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.objective, self._rows, self._tokenizer = objective, rows, tokenizer
        self._end_id = end_of_document_id(tokenizer)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, number: int) -> Batch:
        """Return a row as training had it, alone."""
        row = self._rows[number]
        ends = [t for t, token in enumerate(row.ids[:-1]) if token == self._end_id]
        rows = Rows(
            ids_BL=torch.tensor([row.ids]),
            boundaries=torch.tensor(ends, dtype=torch.int64),
            valid_B=torch.tensor([True]),
            source_B=torch.zeros(1, dtype=torch.int16),
            position=torch.tensor([row.position]),
        )
        return self.objective.collate(rows)

    def parts(self, number: int) -> list[Part]:
        """Return its documents; it is one where labels are not tokens of it."""
        ids, batch = self._rows[number].ids, self.batch(number)
        if batch.labels_BT.shape != batch.input_ids.shape:
            return [self._part(number, 0, len(ids), batch)]
        ends = [t + 1 for t, token in enumerate(ids) if token == self._end_id]
        edges = sorted({0, *ends, len(ids)})
        return [
            self._part(number, first, stop, self._only(batch, first, stop))
            for first, stop in pairwise(edges)
        ]

    def _part(self, number: int, first: int, stop: int, batch: Batch) -> Part:
        row = self._rows[number]
        documents = "-".join(map(str, dict.fromkeys(row.documents)))
        where = (
            f"{row.source}  {row.shard}  tokens {row.start + first:,} to {row.start + stop - 1:,}  "
            f"of documents {documents}"
        )
        text = str(self._tokenizer.decode(row.ids[first:stop]))
        return Part(row.position, where, text, batch)

    def _only(self, batch: Batch, first: int, stop: int) -> Batch:
        """Return ``batch`` with nothing asked but the tokens from ``first`` to before ``stop``."""
        # a causal model is asked for a token at the place before it
        shift = 1 if self.objective.causal else 0
        asked = slice(max(0, first - shift), stop - shift)
        labels_BT = torch.full_like(batch.labels_BT, IGNORE_INDEX)
        labels_BT[:, asked] = batch.labels_BT[:, asked]
        count_B = (labels_BT != IGNORE_INDEX).sum(1)
        return replace(batch, labels_BT=labels_BT, counts=dict.fromkeys(batch.counts, count_B))


class ExampleRows:
    """Labelled examples, for a task. What was left out of the step since is among them.

    Raises:
        DataError: if the examples are not those of the run, or it is not known which the step had.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        task: Task,
        saved: CheckpointState,
        *,
        step: int,
        rows_of: Sequence[int],
    ) -> None:
        if not rows_of:
            raise DataError(
                "which examples this step had is not known: its incident does not say",
                where=run_dir,
                value=f"step {step}",
                remedy="name an incident of a later version of hfscale",
            )
        self.objective = task
        data = Run(config).shape.data
        assert isinstance(data, ExampleData)
        first, stop = rows_of
        self._rows, self._examples = data.step(first, stop - first, saved=saved)

    def __len__(self) -> int:
        return len(self._rows.features)

    def batch(self, number: int) -> Batch:
        """Return a feature as training had it, alone."""
        rows, one = self._rows, slice(number, number + 1)
        alone = Examples(
            rows.features[one], rows.valid_B[one], rows.source_B[one], rows.position[one]
        )
        return self.objective.collate(alone)

    def parts(self, number: int) -> list[Part]:
        """Return the feature itself."""
        feature = self._rows.features[number]
        example = self._examples[feature["example"]]
        where = f"example {feature['example']:,} of data.train, id {example['id']}"
        text = json.dumps(
            {role: cell for role, cell in example.items() if role != "id"}, ensure_ascii=False
        )
        return [Part(int(self._rows.position[number]), where, text, self.batch(number))]
