"""Predictions of a task for a handful of examples: batched by length, given back in their order."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hfscale.objectives.base import Model
from hfscale.stream.examples import BadExample, micro_batch
from hfscale.tasks.base import Example, Task


@torch.no_grad()
def predict(task: Task, model: Model, examples: Sequence[Example], *, batch: int, device: torch.device, first: int = 0,
            refuse_long: bool = False, answers: bool = False) -> list[dict[str, Any]]:
    """Return ``{"id", "prediction", ...}`` of each example, in order; of one that cannot be used, a ``problem`` and no prediction.

    ``first`` is the number of the first of them among all.
    """
    rows, owners, problems = list[dict[str, Any]](), list[int](), dict[int, str]()
    for number, example in enumerate(examples):
        try:
            made = task.answered_features(example) if answers else task.features(example)
            if [feature.pop("truncated", False) for feature in made].count(True) and refuse_long:
                raise BadExample(f"it is longer than {task.setting.seq_len} tokens (data.max_length)")
        except BadExample as error:
            problems[number] = str(error)
            continue
        rows += [{**feature, "example": first + number} for feature in made]
        owners += [number] * len(made)
    outputs: list[list[dict[str, Any]]] = [[] for _ in examples]
    by_length = np.argsort([-len(row["input_ids"]) for row in rows], kind="stable")  # what is too large for the memory shows at once
    found = dict[int, dict[str, Any]]()
    for begin in range(0, len(rows), batch):
        numbers = by_length[begin:begin + batch]
        taken = micro_batch(rows, numbers, numbers)
        found |= zip(numbers.tolist(), task.predict(model, task.collate(taken).to(device), taken), strict=True)
    for number, owner in enumerate(owners):
        outputs[owner].append(found[number])
    return [{"id": example["id"], **({"prediction": None, "problem": problems[number]} if number in problems else
                                     task.answer(example, outputs[number]))} for number, example in enumerate(examples)]
