"""The incidents of a run, and which documents of a step are to blame for one: its rows are run
again, each alone, with the weights of the checkpoint before.

A step's gradient is the sum of its rows' gradients, each over the count of the whole step. So a row
is ranked by the norm of its part, then the documents of the worst rows by the norm of theirs. What
repeats itself pushes the weights one way all along, so its part is large even where its loss is
small; garbage is found by both. One process, in fp32 and without dropout; nothing is written.

Shape legend: L = ``seq_len``; a row has L + 1 tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.config.inference import Inference
from hfscale.config.schema import RunConfig
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import CheckpointError, DataError
from hfscale.log import progress_bar
from hfscale.monitor.incidents import Incident, incidents
from hfscale.objectives.base import ROUTER, Batch, Objective, Setting, load_objective
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.reports.batch import Row, rebuild
from hfscale.run.model import RunModel
from hfscale.stream.rows import Rows
from hfscale.tokenizer import end_of_document_id

WORST_ROWS = 8  # by gradient and by loss, whose documents are looked at one by one

Gradient = list[Tensor]  # of each parameter


@dataclass(frozen=True)
class Suspect:
    """A document of the step, or what of it lies in one row."""

    row: Row
    first: int  # of the row's tokens
    stop: int  # the one after its last
    loss: float  # a scored token
    grad_norm: float  # of its part of the step's gradient
    rest: float  # norm of the step's gradient without it
    text: str


@dataclass(frozen=True)
class Rerun:
    """A step run again. ``suspects`` are the documents of its worst rows."""

    checkpoint: str  # whose weights were asked
    rows: int
    grad_norm: float
    suspects: list[Suspect]

    def by_gradient(self) -> list[Suspect]:
        """Return the suspects by the norm of their gradient, the largest first."""
        return sorted(self.suspects, key=lambda one: _rank(one.grad_norm))

    def by_loss(self) -> list[Suspect]:
        """Return the suspects by their loss, the highest first."""
        return sorted(self.suspects, key=lambda one: _rank(one.loss))


def listed(run_dir: Path) -> list[str]:
    """Return a line for each incident of a run, oldest first."""
    lines = []
    for number, one in enumerate(incidents(run_dir), 1):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.time))
        lines.append(f"{number:>4}  {when}  step {one.step:>8,}  {one.decision:<6}  {one.text}")
    return lines


def pick(run_dir: Path, number: int) -> Incident:
    """Return incident ``number`` of a run, counted from 1.

    Raises:
        DataError: if there is none of that number.
    """
    listed = incidents(run_dir)
    if not 1 <= number <= len(listed):
        raise DataError(
            "this run has no incident of that number",
            where=run_dir / run_files.INCIDENTS,
            value=number,
            remedy=f"it has {len(listed)}: hfscale incident RUN lists them",
        )
    return listed[number - 1]


def rerun(run_dir: Path, *, step: int, rows_of: tuple[int, ...] = ()) -> Rerun:
    """Return the documents of ``step``, whose rows lie at ``rows_of`` where that is known.

    Raises:
        UserError: if its rows are not known or not of text, or there is no checkpoint.
    """
    rows = [
        row
        for row in rebuild(run_dir, step=step, rows_of=rows_of, whole=True).rows
        if row.documents
    ]
    model = _model(run_dir, step)
    trained = model.run
    assert isinstance(trained, RunConfig), "others are not rebuilt"
    setting = Setting(
        seq_len=trained.data.seq_len,
        cross_document=trained.data.cross_document,
        tokenizer=model.tokenizer,
        seed=trained.run.seed,
    )
    engine = model.engine(None, Inference(precision="fp32"))
    make = partial(load_objective, trained.objective)
    objective = model.objective(make, setting, engine)
    if type(objective).forwards is not Objective.forwards:
        raise DataError(
            "a row of this objective has no loss of its own: rows are compared with each other",
            where=run_dir,
            value=trained.objective.name,
            remedy=f"read them: hfscale batch RUN --step {step}",
        )
    passes = _Passes(objective, engine, rows, end_id=end_of_document_id(model.tokenizer))
    chosen = passes.worst()
    suspects = [
        replace(
            suspect, text=str(model.tokenizer.decode(suspect.row.ids[suspect.first : suspect.stop]))
        )
        for row in chosen
        for suspect in passes.documents(row)
    ]
    return Rerun(model.checkpoint.name, len(rows), passes.grad_norm, suspects)


def _model(run_dir: Path, step: int) -> RunModel:
    """Return the newest checkpoint from before ``step``, or else the first after it.

    Raises:
        CheckpointError: if there is none.
    """
    saved = layout.committed(run_dir / run_files.CHECKPOINTS)
    if not saved:
        raise CheckpointError(
            "this run has no checkpoint whose weights could be asked",
            where=run_dir,
            remedy=f"read what the step was trained on: hfscale batch RUN --step {step}",
        )
    before = [path for path in saved if layout.step_of(path) < step]
    chosen = before[-1] if before else saved[0]
    return RunModel(str(chosen), chosen)


class _Passes:
    """Forward and backward passes over the rows of a step, one at a time."""

    def __init__(
        self, objective: Objective, engine: InferenceEngine, rows: Sequence[Row], *, end_id: int
    ) -> None:
        self._objective, self._engine, self._rows, self._end_id = objective, engine, rows, end_id
        self._params = [param for param in engine.module.parameters() if param.requires_grad]
        self._weights = {
            term: weight
            for term, weight in objective.weights().items()
            if weight and term != ROUTER
        }
        self._batches = [self._batch(row) for row in rows]
        self._counts = {
            term: sum(int(batch.counts[term].sum()) for batch in self._batches)
            for term in self._weights
        }
        self._whole = [torch.zeros_like(param) for param in self._params]

    @property
    def grad_norm(self) -> float:
        """The norm of the gradient of all rows that ``worst`` went through."""
        return _norm(self._whole)

    def worst(self) -> list[Row]:
        """Return the rows with the largest gradients and those with the highest losses."""
        losses, norms = list[float](), list[float]()
        with progress_bar("rows of the step", len(self._rows), unit=" rows") as bar:
            for batch in self._batches:
                loss, gradient = self._pass(batch)
                losses.append(loss)
                norms.append(_norm(gradient))
                for total, part in zip(self._whole, gradient, strict=True):
                    total += part
                bar.update()
        numbers = range(len(self._rows))
        chosen = {
            number
            for figures in (norms, losses)
            for number in sorted(numbers, key=lambda k: _rank(figures[k]))[:WORST_ROWS]
        }
        return [self._rows[number] for number in sorted(chosen)]

    def documents(self, row: Row) -> Iterator[Suspect]:
        """Yield the documents of ``row`` that are scored; it is one where labels are not tokens of
        it.
        """
        batch = self._batch(row)
        parts = [(0, len(row.ids))]
        if batch.labels_BT.shape == batch.input_ids.shape:
            parts = _cut(row.ids, self._end_id)
        for first, stop in parts:
            alone = batch if len(parts) == 1 else self._only(batch, first, stop)
            if not (alone.labels_BT != IGNORE_INDEX).any():
                continue
            loss, gradient = self._pass(alone)
            rest = [whole - part for whole, part in zip(self._whole, gradient, strict=True)]
            yield Suspect(row, first, stop, loss, _norm(gradient), _norm(rest), text="")

    def _batch(self, row: Row) -> Batch:
        """Return a batch of ``row`` alone, as training had it."""
        ends = [t for t, token in enumerate(row.ids[:-1]) if token == self._end_id]
        rows = Rows(
            ids_BL=torch.tensor([row.ids]),
            boundaries=torch.tensor(ends, dtype=torch.int64),
            valid_B=torch.tensor([True]),
            source_B=torch.zeros(1, dtype=torch.int16),
            position=torch.tensor([row.position]),
        )
        return self._objective.collate(rows)

    def _only(self, batch: Batch, first: int, stop: int) -> Batch:
        """Return ``batch`` with nothing asked but the tokens from ``first`` to before ``stop``."""
        # a causal model is asked for a token at the place before it
        shift = 1 if self._objective.causal else 0
        asked = slice(max(0, first - shift), stop - shift)
        labels_BT = torch.full_like(batch.labels_BT, IGNORE_INDEX)
        labels_BT[:, asked] = batch.labels_BT[:, asked]
        return replace(batch, labels_BT=labels_BT)

    def _pass(self, batch: Batch) -> tuple[float, Gradient]:
        """Return the loss a scored token, and the gradient of the batch's part of the step's
        loss.
        """
        sums = self._objective.loss(self._engine, batch.to(self._engine.device))
        parts = [
            weight * sums[term].sum() / max(1, self._counts[term])
            for term, weight in self._weights.items()
        ]
        part = torch.stack(parts).sum()
        gradient = torch.autograd.grad(
            part, self._params, allow_unused=True, materialize_grads=True
        )
        asked = int((batch.labels_BT != IGNORE_INDEX).sum())
        loss = float(part.detach()) * max(self._counts.values()) / max(1, asked)
        return loss, [*gradient]


def _cut(ids: Sequence[int], end_id: int) -> list[tuple[int, int]]:
    """Return the documents of a row, as (first token, the one after the last)."""
    ends = [t + 1 for t, token in enumerate(ids) if token == end_id]
    edges = sorted({0, *ends, len(ids)})
    return [*pairwise(edges)]


def _norm(gradient: Gradient) -> float:
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in gradient]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _rank(figure: float) -> float:
    """Return the place of ``figure`` in a list whose worst comes first: what is no number is
    worst.
    """
    return -figure if math.isfinite(figure) else -math.inf
