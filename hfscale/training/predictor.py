"""Predictions of a task for a handful of examples: batched by length, given back in their order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hfscale.control_tokens import NotText
from hfscale.dist.agree import from_all_ranks
from hfscale.dist.stop import StopRequest
from hfscale.engine.inference import InferenceEngine
from hfscale.stream.examples import BadExample, Feature, micro_batch
from hfscale.tasks.base import Example, Output, Task


def stopped(stop: StopRequest, *, together: bool) -> bool:
    """Return whether this process was asked to stop; of those that compute ``together``, whether
    any was. Collective then.
    """
    return any(from_all_ranks(stop.requested)) if together else stop.requested


@torch.no_grad()
def predict(
    task: Task,
    engine: InferenceEngine,
    examples: Sequence[Example],
    *,
    batch: int,
    first: int = 0,
    refuse_long: bool = False,
    answers: bool = False,
    stop: StopRequest | None = None,
) -> list[Output] | None:
    """Return ``{"id", "prediction", ...}`` of each example, in order.

    One that cannot be used has a ``problem`` and no prediction; one that was cut, because it is
    longer than allowed, is ``truncated``. None: it was asked to ``stop`` before the last batch.
    ``first`` is the number of the first of them among all. Where the ranks compute ``together`` all
    must call, with any examples or none.
    """
    features = _Features()
    for number, example in enumerate(examples):
        features.add(task, number, example, refuse_long=refuse_long, answers=answers)
    rows = [{**row, "example": first + owner} for row, owner in zip(features.rows, features.owners)]
    batches = [(rows, numbers) for numbers in _batches(task, rows, size=batch)]
    own = len(batches)
    if engine.together:
        # equally many passes on each rank: the last ones of some are of a row that nobody asks for
        everyone = from_all_ranks((own, rows[:1]))
        spare = [row for _, some in everyone for row in some]
        most = max(count for count, _ in everyone)
        batches += [(spare, np.zeros(1, int))] * (most - own)
    output_of: dict[int, Output] = {}
    for turn, (some, numbers) in enumerate(batches):
        if stop is not None and stopped(stop, together=engine.together):
            return None
        taken = micro_batch(some, numbers, numbers)
        outputs = task.predict(engine, task.collate(taken).to(engine.device), taken)
        if turn < own:
            output_of |= zip(numbers.tolist(), outputs, strict=True)
    answered: list[list[Output]] = [[] for _ in examples]
    for number, owner in enumerate(features.owners):
        answered[owner].append(output_of[number])
    return [
        features.prediction(task, number, example, answered[number])
        for number, example in enumerate(examples)
    ]


class _Features:
    """What a task makes of examples, and what is to be said of each."""

    def __init__(self) -> None:
        self.rows: list[Feature] = []
        self.owners: list[int] = []  # number of the example that a row is of
        self._problems: dict[int, str] = {}
        self._cut: set[int] = set()

    def add(
        self, task: Task, number: int, example: Example, *, refuse_long: bool, answers: bool
    ) -> None:
        """Take the features of one example, or remember why there are none."""
        try:
            rows = task.answered_features(example) if answers else task.features(example)
            truncated = [row.pop("truncated", False) for row in rows]
            if any(truncated):
                if refuse_long:
                    raise BadExample(
                        f"it is longer than {task.setting.seq_len} tokens (data.max_length)"
                    )
                self._cut.add(number)
        except (BadExample, NotText) as error:
            self._problems[number] = str(error)
            return
        self.rows += rows
        self.owners += [number] * len(rows)

    def prediction(
        self, task: Task, number: int, example: Example, outputs: list[Output]
    ) -> Output:
        """Return what is written of an example."""
        said: Output = {"id": example["id"]}
        if number in self._problems:
            said |= {"prediction": None, "problem": self._problems[number]}
        else:
            said |= task.answer(example, outputs)
        if number in self._cut:
            said["truncated"] = True
        return said


def _batches(task: Task, rows: Sequence[Feature], *, size: int) -> list[np.ndarray]:
    """Return numbers of rows in batches, the longest first: what is too large for the memory shows
    at once. A model that reads padding is asked one length at a time.
    """
    lengths = np.array([len(row["input_ids"]) for row in rows], int)
    by_length = np.argsort(-lengths, kind="stable")
    alike = [by_length]
    if task.reads_padding:
        alike = np.split(by_length, np.flatnonzero(np.diff(lengths[by_length])) + 1)
    return [group[begin : begin + size] for group in alike for begin in range(0, len(group), size)]
