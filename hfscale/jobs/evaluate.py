"""Scores of a task, from a file of predictions and the references; and where scores of any kind are
kept.

    EVALUATIONS/NAME/step-00001000-KEY/predictions.jsonl   made by jobs/predict.py
    EVALUATIONS/NAME/step-00001000-KEY/scores.json         what is printed, with confidence
                                                           intervals

KEY digests model, data and task, so what was evaluated once is found again. EVALUATIONS is in the
run directory, or here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from math import isfinite
from pathlib import Path

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.config.inference import PredictConfig
from hfscale.errors import DataError, counted
from hfscale.jobs.asked import examples_of, key_of
from hfscale.metrics.kept import Scores
from hfscale.metrics.measure import Measure
from hfscale.objectives.base import Setting, check_options
from hfscale.run.examples import FEW
from hfscale.run.model import Model, RunModel
from hfscale.shards.files import write_atomically
from hfscale.shards.tables import table_rows
from hfscale.stream.examples import BadExample, Example
from hfscale.tasks.base import Output
from hfscale.tasks.table import task_class


def folder_of(model: Model, what: str, key: dict[str, str]) -> Path:
    """Return where the evaluation of ``model`` belongs: in its run, or here."""
    short = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=4).hexdigest()
    return model.home / run_files.EVALUATIONS / what / f"{Path(model.address).name}-{short}"


def with_folder(config: PredictConfig, model: Model) -> PredictConfig:
    """Return ``config`` with its predictions in the folder of its evaluation."""
    table, split = Path(config.data.train), config.predict.split
    held_out = config.data.validation or config.data.test
    what = f"{config.task.name}-{split if held_out else table.name.split('.')[0]}"
    out = folder_of(model, what, key_of(config, model)) / run_files.PREDICTIONS
    out.parent.mkdir(parents=True, exist_ok=True)
    return config.model_copy(update={"predict": config.predict.model_copy(update={"out": out})})


def score(config: PredictConfig, predictions: Path, *, model: Model | None, name: str) -> Scores:
    """Return the scores of a file of predictions, as those of ``name``. Of the ``model``, if there
    is one, only what it says of labels is read.

    Raises:
        DataError: if a line is broken, or predictions and references are not of the same examples.
    """
    kind = task_class(config.task.name)
    options = check_options(kind.Options, config.task.options, where="task.options")
    rows = _predictions(predictions)
    references = list(examples_of(config))
    _check_ids(rows, references, where=predictions)
    usable = [example for example in references if "problem" not in rows[example["id"]]]
    if not usable:
        raise DataError(
            "no example can be scored",
            where=config.data.train,
            remedy="mend them",
            value=[f"{name}: {row['problem']}" for name, row in islice(rows.items(), 3)],
        )
    facts = model.facts(kind) if model else {}
    chosen = [rows[example["id"]] for example in usable]
    try:
        facts = facts or kind.facts(options, iter(usable))
        task = kind(options, Setting(seq_len=config.data.max_length, facts=facts))
        scores = described(task.measure(chosen, usable), model=name)
        exact = _defined(task.score(chosen, usable))
    except BadExample as error:
        raise DataError(
            str(error),
            where=config.data.train,
            remedy="mend the examples, or say more of the task (key=value)",
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if predictions == config.predict.out:  # made here: a defect
            raise
        raise DataError(
            "these are no predictions of this task",
            where=predictions,
            value=repr(error),
            remedy=f"give what hfscale predict --task {config.task.name} writes",
        ) from error
    return scores.model_copy(
        update={
            "task": config.task.name,
            "options": config.task.options,
            "left_out": len(references) - len(usable),
            "scores": exact,
        }
    )


def _predictions(file: Path) -> dict[str, Output]:
    """Return the lines of a file of predictions by the id of their example.

    Raises:
        DataError: if a line has no prediction, or an id occurs twice.
    """
    rows = dict[str, Output]()
    for where, row in table_rows(file):
        name = str(row.get("id"))
        if name in rows or not {"prediction", "problem"} & row.keys():
            raise DataError(
                "an id occurs twice" if name in rows else "there is no prediction",
                where=where,
                value=str(row)[:80],
                remedy='one line for each example: {"id": ..., "prediction": ...}',
            )
        rows[name] = row
    return rows


def _check_ids(rows: Mapping[str, Output], references: Sequence[Example], *, where: Path) -> None:
    """Return if each example has its prediction, and each prediction its example."""
    ids = [example["id"] for example in references]
    missing = [name for name in ids if name not in rows]
    if missing or len(rows) != len(ids):
        unknown = [] if missing else [*rows.keys() - {*ids}]
        raise DataError(
            f"{len(rows):,} predictions for {len(ids):,} examples, {len(missing):,} of which "
            "have none",
            where=where,
            value=missing[:5] or unknown[:5],
            remedy="give the predictions of these examples, whole; ids must be the same",
        )


def described(measure: Measure, *, model: str) -> Scores:
    """Return what ``scores.json`` says of a measure of ``model``; what is not a number is null."""
    scores, notes = measure.scores(), dict(measure.notes)
    intervals = {
        name: (float(low), float(high))
        for name, (low, high) in measure.intervals().items()
        if isfinite(low) and isfinite(high)
    }
    if alike := [name for name in scores if name not in intervals and isfinite(scores[name])]:
        notes["no interval"] = f"{', '.join(alike)}: no other draw of these examples moves it"
    return Scores(
        model=model,
        examples=measure.examples,
        scores=_defined(scores),
        intervals=intervals,
        notes=notes | caution(measure.examples),
    )


def caution(examples: int) -> dict[str, str]:
    """Return the note on scores of a handful of examples, if they are of no more."""
    said = f"{counted(examples, 'example')}: as many others may well score otherwise"
    return {"few": said} if examples < FEW else {}


def _defined(scores: dict[str, float]) -> dict[str, float | None]:
    return {name: float(value) if isfinite(value) else None for name, value in scores.items()}


def keep(folder: Path, model: Model, scores: Scores) -> None:
    """Write scores to ``folder``, and of a run to its TensorBoard at the checkpoint's step."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / run_files.SCORES,
        json.dumps(scores.as_dict(), indent=1, ensure_ascii=False).encode(),
    )
    if isinstance(model, RunModel):
        from torch.utils.tensorboard import SummaryWriter

        drawn = model.home / run_files.TENSORBOARD / run_files.EVALUATIONS
        with SummaryWriter(str(drawn)) as board:
            for name, value in scores.scores.items():
                if value is not None:
                    board.add_scalar(
                        f"{folder.parent.name}/{name}", value, layout.step_of(model.checkpoint)
                    )


def table(found: Sequence[Scores]) -> str:
    """Return the scores of one or more models as lines, with their intervals."""
    lines = []
    for one in found:
        left = f", {one.left_out:,} left out" if one.left_out else ""
        lines.append(
            f"{one.model}  {counted(one.examples, 'row' if one.objective else 'example')}{left}"
        )
        for name, value in one.scores.items():
            low, high = one.intervals.get(name, (None, None))
            shown = "undefined" if value is None else f"{value:.4f}"
            lines.append(
                f"  {name:<24}{shown:>12}"
                + (f"   95 % [{low:.4f}, {high:.4f}]" if low is not None else "")
            )
        lines += [f"  {name}: {note}" for name, note in one.notes.items()]
    return "\n".join(lines)
