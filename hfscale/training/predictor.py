"""Predictions of a task for a handful of examples: batched by length, given back in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hfscale.dist.agree import from_all_ranks
from hfscale.dist.stop import StopRequest
from hfscale.encoding import NotText
from hfscale.engine.inference import InferenceEngine
from hfscale.stream.examples import BadExample, micro_batch
from hfscale.tasks.base import Example, Task


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
) -> list[dict[str, Any]] | None:
    """Return ``{"id", "prediction", ...}`` of each example, in order.

    One that cannot be used has a ``problem`` and no prediction; one that was cut, because it is
    longer than allowed, is ``truncated``. None: it was asked to ``stop`` before the last batch.
    ``first`` is the number of the first of them among all. Where the ranks compute ``together`` all
    must call, with any examples or none.
    """
    rows, owners, problems, cut = list[dict[str, Any]](), list[int](), dict[int, str](), set[int]()
    for number, example in enumerate(examples):
        try:
            made = task.answered_features(example) if answers else task.features(example)
            truncated = [feature.pop("truncated", False) for feature in made]
            if any(truncated):
                if refuse_long:
                    raise BadExample(
                        f"it is longer than {task.setting.seq_len} tokens (data.max_length)"
                    )
                cut.add(number)
        except (BadExample, NotText) as error:
            problems[number] = str(error)
            continue
        rows += [{**feature, "example": first + number} for feature in made]
        owners += [number] * len(made)
    by_length = np.argsort(
        [-len(row["input_ids"]) for row in rows], kind="stable"
    )  # what is too large for the memory shows at once
    alike = [by_length]
    if task.reads_padding:
        lengths = np.array([len(rows[n]["input_ids"]) for n in by_length])
        alike = np.split(by_length, np.flatnonzero(np.diff(lengths)) + 1)
    batches = [
        (rows, group[begin : begin + batch])
        for group in alike
        for begin in range(0, len(group), batch)
    ]
    own, found = len(batches), dict[int, dict[str, Any]]()
    if (
        engine.together
    ):  # equally many passes on each rank: the last ones of some are of a row that nobody asks for
        everyone = from_all_ranks((own, rows[:1]))
        spare = [row for _, some in everyone for row in some]
        batches += [(spare, np.zeros(1, int))] * (max(count for count, _ in everyone) - own)
    for turn, (features, numbers) in enumerate(batches):
        if stop is not None and stopped(stop, together=engine.together):
            return None
        taken = micro_batch(features, numbers, numbers)
        made_here = task.predict(engine, task.collate(taken).to(engine.device), taken)
        if turn < own:
            found |= zip(numbers.tolist(), made_here, strict=True)
    outputs: list[list[dict[str, Any]]] = [[] for _ in examples]
    for number, owner in enumerate(owners):
        outputs[owner].append(found[number])
    return [
        {
            "id": example["id"],
            **(
                {"prediction": None, "problem": problems[number]}
                if number in problems
                else task.answer(example, outputs[number])
            ),
            **({"truncated": True} if number in cut else {}),
        }
        for number, example in enumerate(examples)
    ]
