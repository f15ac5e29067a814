"""The incidents of a run, and which documents of a step are to blame for one: its rows are run
again with the weights of the checkpoint before, and each is held against the others.

A step's gradient is the sum of its rows' gradients, each over the count of the whole step. So a row
is ranked by the norm of its part, then the documents of the worst rows by the norm of theirs. What
repeats itself pushes the weights one way all along, so its part is large even where its loss is
small; garbage is found by both. Where rows are compared with each other (contrastive), the part of
a row is what passes through its own vectors. One process, in fp32, without dropout; nothing is
written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.inference import Inference
from hfscale.config.schema import RunConfig
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import CheckpointError, DataError
from hfscale.log import progress_bar
from hfscale.monitor.incidents import Incident, incidents
from hfscale.objectives.base import ROUTER, Batch, Forward, Objective, Setting, load_objective
from hfscale.reports.batch import rebuild
from hfscale.reports.step_rows import ExampleRows, Part, StepRows, TokenRows
from hfscale.run.model import RunModel
from hfscale.tasks.table import load_task, task_class

WORST_ROWS = 8  # by gradient and by loss, whose documents are looked at one by one

Gradient = list[Tensor]  # of each parameter


@dataclass(frozen=True)
class Suspect:
    """A document or an example of the step, or what of it lies in one row."""

    part: Part
    loss: float  # what training minimizes, of this part alone
    grad_norm: float  # of its part of the step's gradient
    rest: float  # norm of the step's gradient without it


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
    """Return the documents or examples of ``step``, whose rows lie at ``rows_of`` where that is
    known.

    Raises:
        UserError: if its rows are not known, or there is no checkpoint.
    """
    model = _model(run_dir, step)
    engine = model.engine(None, Inference(precision="fp32"))
    rows = _rows(run_dir, model, engine, step=step, rows_of=rows_of)
    passes = _Passes(rows, engine)
    chosen = passes.worst()
    return Rerun(model.checkpoint.name, len(rows), passes.grad_norm, [*passes.suspects(chosen)])


def _rows(
    run_dir: Path,
    model: RunModel,
    engine: InferenceEngine,
    *,
    step: int,
    rows_of: tuple[int, ...],
) -> StepRows:
    """Return the rows of ``step`` and the objective or task that was trained on them."""
    trained, data = model.run, model.run.data
    setting = Setting(
        seq_len=data.seq_len,
        cross_document=getattr(data, "cross_document", True),
        tokenizer=model.tokenizer,
        seed=trained.run.seed,
    )
    if isinstance(trained, FinetuneConfig):
        setting = replace(setting, facts=model.facts(task_class(trained.task.name)))
        task = model.objective(partial(load_task, trained.task), setting, engine)
        return ExampleRows(run_dir, trained, task, model.state, step=step, rows_of=rows_of)
    assert isinstance(trained, RunConfig), "nothing else trains"
    make = partial(load_objective, trained.objective)
    objective = model.objective(make, setting, engine)
    read = rebuild(run_dir, step=step, rows_of=rows_of, whole=True).rows
    return TokenRows([row for row in read if row.documents], objective, model.tokenizer)


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

    def __init__(self, rows: StepRows, engine: InferenceEngine) -> None:
        self._rows, self._objective, self._engine = rows, rows.objective, engine
        self._params = [param for param in engine.module.parameters() if param.requires_grad]
        self._weights = {
            term: weight
            for term, weight in self._objective.weights().items()
            if weight and term != ROUTER
        }
        self._batches = [rows.batch(number).to(engine.device) for number in range(len(rows))]
        self._scales = {
            term: weight / max(1, sum(_count(batch, term) for batch in self._batches))
            for term, weight in self._weights.items()
        }
        # a row of an objective that compares rows has no gradient without the others
        self._compares = type(self._objective).forwards is not Objective.forwards
        self._whole = [torch.zeros_like(param) for param in self._params]

    @property
    def grad_norm(self) -> float:
        """The norm of the gradient of all rows that ``worst`` went through."""
        return _norm(self._whole)

    def worst(self) -> list[int]:
        """Return which rows have the largest gradients, and which the highest losses."""
        losses, norms = list[float](), list[float]()
        with progress_bar("rows of the step", len(self._batches), unit=" rows") as bar:
            for forward in self._forwards(self._batches):
                gradient = self._gradient(forward)
                losses.append(self._loss(forward))
                norms.append(_norm(gradient))
                for total, part in zip(self._whole, gradient, strict=True):
                    total += part
                bar.update()
        chosen = set[int]()
        for figures in (norms, losses):
            worst_first = sorted(range(len(figures)), key=lambda k: _rank(figures[k]))
            chosen.update(worst_first[:WORST_ROWS])
        return sorted(chosen)

    def suspects(self, chosen: Collection[int]) -> Iterator[Suspect]:
        """Yield the documents of the rows ``chosen`` in which something is asked."""
        if self._compares:
            for number, forward in enumerate(self._forwards(self._batches)):
                if number in chosen:
                    [part] = self._rows.parts(number)
                    yield self._suspect(part, forward)
            return
        for number in chosen:
            for part in self._rows.parts(number):
                alone = part.batch.to(self._engine.device)
                if any(_count(alone, term) for term in self._weights):
                    [forward] = self._forwards([alone])
                    yield self._suspect(part, forward)

    def _suspect(self, part: Part, forward: Forward) -> Suspect:
        gradient = self._gradient(forward)
        rest = [whole - own for whole, own in zip(self._whole, gradient, strict=True)]
        return Suspect(part, self._loss(forward), _norm(gradient), _norm(rest))

    def _forwards(self, batches: Iterable[Batch]) -> Iterator[Forward]:
        return self._objective.forwards(self._engine, batches, self._scales)

    def _loss(self, forward: Forward) -> float:
        """Return the loss of a row, over its own counts."""
        losses = [
            weight * float(forward.sums[term].detach().sum()) / max(1, _count(forward.batch, term))
            for term, weight in self._weights.items()
        ]
        return sum(losses)

    def _gradient(self, forward: Forward) -> Gradient:
        """Return the part of a row in the gradient of the step's loss."""
        loss = forward.surrogate
        if loss is None:
            parts = [scale * forward.sums[term].sum() for term, scale in self._scales.items()]
            loss = torch.stack(parts).sum()
        gradient = torch.autograd.grad(
            loss, self._params, allow_unused=True, materialize_grads=True
        )
        return [*gradient]


def _count(batch: Batch, term: str) -> int:
    return int(batch.counts[term].sum())


def _norm(gradient: Gradient) -> float:
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in gradient]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _rank(figure: float) -> float:
    """Return the place of ``figure`` in a list whose worst comes first: what is no number is
    worst.
    """
    return -figure if math.isfinite(figure) else -math.inf
