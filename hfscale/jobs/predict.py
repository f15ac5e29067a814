"""Prediction in its simplest form: continuations of prompts, from a run, a checkpoint, an export or a transformers folder."""
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from hfscale.errors import DataError
from hfscale.jobs.opening import open_model
from hfscale.training.predictor import Prompt, Sampling, generate


def run(name: str, prompts: Iterable[Prompt], *, sampling: Sampling, batch: int = 8) -> Iterator[dict[str, str]]:
    """Yield ``{"id", "prompt", "text"}`` for each prompt, in order.

    Raises:
        UserError: if there is no such model, or a prompt does not fit it.
    """
    model, tokenizer = open_model(name)
    yield from generate(model, tokenizer, prompts, sampling=sampling, batch=batch)


def read_prompts(path: Path, *, field: str = "prompt") -> list[Prompt]:
    """Return the prompts of a JSONL file: a string under ``field`` a line; ``id`` is the line's own or its number from 0.

    Raises:
        DataError: for a missing file, a broken line, a line without the field, or an id that occurs twice.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # not splitlines: JSON strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("the prompts cannot be read", where=path, value=str(error), remedy="give a JSONL file in UTF-8") from error
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        where = f"{path}:{number + 1}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}", where=where, value=line[:80], remedy="one JSON object a line, in UTF-8") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str) or not is_text(record[field]):
            raise DataError(f"no text under {field!r}", where=where, value=line[:80], remedy=f'write {{"{field}": "..."}} on each line')
        prompt = Prompt(str(record.get("id", number)), record[field])
        if prompt.id in prompts:
            raise DataError("an id occurs twice", where=where, value=prompt.id, remedy="give each prompt an id of its own")
        prompts[prompt.id] = prompt
    if not prompts:
        raise DataError("no prompts", where=path, remedy=f'write {{"{field}": "..."}} on each line')
    return list(prompts.values())


def is_text(value: str) -> bool:
    """Return whether ``value`` can be written as UTF-8; half of a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_predictions(path: Path, predictions: Iterable[dict[str, str]]) -> int:
    """Return how many predictions were written to ``path`` as JSONL; it appears whole or not at all.

    Raises:
        DataError: if it exists already.
    """
    if path.exists():
        raise DataError("this file exists already; nothing was written", where=path, remedy="give another --out, or remove it")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    count = 0
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
            file.flush()
            count += 1
    part.replace(path)
    return count
