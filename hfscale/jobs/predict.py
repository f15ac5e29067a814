"""Predictions for a table: JSONL out, in order, sharded over processes, and resumed after a kill
without repeats or losses.

    .OUT.parts/config.yaml     what is asked for; every process reads it
    .OUT.parts/key.json        what the predictions depend on: only the same question goes on here
    .OUT.parts/00000012.jsonl  chunk 12, whole or absent: it is written under another name first
    .OUT.parts/00000012.json   how many of its predictions are problems, or of cut texts
    OUT                        all chunks, end to end; then the parts go

Process r of n makes every n-th chunk, if it is not there. At ZeRO stage 3 the processes go through
their chunks together; otherwise they say nothing to each other.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hfscale import run_files
from hfscale.config.inference import PredictConfig
from hfscale.dist import group
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import DataError, counted
from hfscale.log import logger, progress_bar
from hfscale.objectives.base import Setting, check_options
from hfscale.records import Count, Record, load, read_file
from hfscale.run.model import Model, find
from hfscale.shards.files import cannot_write, whole, write_atomically
from hfscale.stream.labelled import LabelledData
from hfscale.tasks.base import Example, Task
from hfscale.tasks.table import code_digest, task_class
from hfscale.training.predictor import predict, stopped

SHOWN = 3  # problems that a message tells
# examples: batched by length among themselves, and the most that a kill costs a process
CHUNK = 512


class _Asked(Record):
    """What half-made predictions are of."""

    key: dict[str, str]
    examples: Count
    chunk: Annotated[int, Field(gt=0, lt=2**31)]


class _Tally(Record):
    """What is to be said of a chunk's predictions."""

    problems: Count
    truncated: Count
    shown: list[str]  # the first problems, with the ids of their examples

    @classmethod
    def of(cls, predictions: Sequence[Mapping[str, Any]]) -> _Tally:
        """Return what is to be said of ``predictions``."""
        bad = [row for row in predictions if "problem" in row]
        return cls(
            problems=len(bad),
            truncated=sum("truncated" in row for row in predictions),
            shown=[f"{row['id']}: {row['problem']}" for row in bad[:SHOWN]],
        )


def parts_of(out: Path) -> Path:
    """Return where the parts of ``out`` lie until it is whole."""
    return out.with_name(f".{out.name}.parts")


def examples_of(config: PredictConfig) -> Iterator[Example]:
    """Yield the examples asked for; without their answers, where these do not matter.

    Raises:
        DataError: as ``read_examples``.
    """
    kind, wanted = task_class(config.task.name), config.predict
    for example in LabelledData(config.data, kind, about="").examples(
        wanted.split, answers=wanted.answers
    ):
        yield (
            example
            if wanted.answers
            else {role: value for role, value in example.items() if role not in kind.answers}
        )


def key_of(config: PredictConfig, model: Model) -> dict[str, str]:
    """Return digests of all that the predictions depend on: model, data, task."""
    kind, data = task_class(config.task.name), config.data
    how = f"{data.max_length} {data.too_long} {config.predict.answers} {config.engine.precision}"
    task = f"{code_digest(kind)} {config.task.model_dump_json()} {how}"
    return {
        "model": model.digest,
        "data": LabelledData(data, kind, about="").digest(config.predict.split),
        "task": hashlib.blake2b(task.encode(), digest_size=16).hexdigest(),
    }


def prepare(config: PredictConfig) -> Path:
    """Return where the config belongs, in the folder of parts, new or half filled. All examples
    were read once: nothing is wrong with them.

    Raises:
        DataError: for bad rows, an OUT that exists, and parts of predictions of something else.
    """
    out, key = config.predict.out, key_of(config, find(config.predict.model))
    if out.exists():
        raise DataError(
            "this file exists already; nothing was written",
            where=out,
            remedy="give another --out, or remove it",
        )
    count, size = sum(1 for _ in examples_of(config)), max(CHUNK, config.predict.batch)
    if not count:
        raise DataError(
            "there are no examples", where=config.data.train, remedy="give at least one row"
        )
    parts = parts_of(out)
    file = parts / "key.json"
    saved: dict[str, Any] = _key(parts) if file.is_file() else {"key": key, "chunk": size}
    if saved["key"] != key and not any(parts.glob("0*.jsonl")):
        saved = {
            "key": key,
            "chunk": size,
        }  # what was asked first was refused, or stopped, before anything was made
    if saved["key"] != key:
        differ = [name for name in key if saved["key"].get(name) != key[name]]
        raise DataError(
            "half-made predictions of something else are in the way",
            where=parts,
            value=f"other {', '.join(differ)}",
            remedy="give another --out, ask for the same again, or remove that folder",
        )
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from None
    write_atomically(
        file, json.dumps({"key": key, "examples": count, "chunk": saved["chunk"]}).encode()
    )
    return parts / run_files.CONFIG


def open_task(config: PredictConfig) -> tuple[InferenceEngine, Task]:
    """Return the model that predicts, and its task.

    Raises:
        UserError: if there is no such model, it has no head for the task, or training would refuse
            it.
    """
    kind, model = task_class(config.task.name), find(config.predict.model)
    options = check_options(kind.Options, config.task.options, where="task.options")
    setting = Setting(seq_len=config.data.max_length)
    engine = model.engine(kind(options, setting).auto_model, config.engine)
    setting = replace(setting, tokenizer=model.framed, facts=model.facts(kind))
    return engine, model.objective(partial(kind, options), setting, engine)


def run(config: PredictConfig, world: World, stop: StopRequest) -> bool:
    """Return True when this process's chunks are there, False when it was stopped before."""
    parts = parts_of(config.predict.out)
    total, size = _begun(parts)
    left = [number for number in range(-(-total // size)) if not _is_there(parts, number)]
    if not left:
        return True
    alone = world.all.size == 1  # a launcher speaks for its ranks
    stop.listen(say="stopping after this batch: what is whole is kept" if alone else None)
    with group.joined(world, needed=config.engine.zero_stage == 3):
        engine, task = open_task(config)
        done = _predict_chunks(config, engine, task, left=left, world=world, stop=stop)
        engine.close()
        return done


def _predict_chunks(
    config: PredictConfig,
    engine: InferenceEngine,
    task: Task,
    *,
    left: Sequence[int],
    world: World,
    stop: StopRequest,
) -> bool:
    """Return as ``run``, after this process's share of the chunks that are ``left``."""
    parts = parts_of(config.predict.out)
    total, size = _begun(parts)
    shares = [
        [number for number in left if number % world.data.size == rank]
        for rank in range(world.data.size)
    ]
    mine = shares[world.data.rank]
    own = sum(min(size, total - number * size) for number in mine)  # examples
    rounds = max(map(len, shares)) if engine.together else len(mine)
    examples, at = examples_of(config), 0
    with progress_bar(
        "predicting" if world.all.rank == 0 else "",
        own if world.all.rank == 0 else None,
        unit=" examples",
    ) as bar:
        for turn in range(rounds):
            first = mine[turn] * size if turn < len(mine) else total
            chunk = list(islice(examples, first - at, first - at + size))
            at = first + len(chunk)
            predictions = predict(
                task,
                engine,
                chunk,
                batch=config.predict.batch,
                first=first,
                refuse_long=config.data.too_long == "refuse",
                answers=config.predict.answers,
                stop=stop,
            )
            if predictions is None:
                return False
            tally = _Tally.of(predictions)
            if tally.problems and config.predict.answers and config.data.on_error == "stop":
                raise DataError(
                    f"{counted(tally.problems, 'example')} cannot be scored",
                    where=config.data.train,
                    value=tally.shown,
                    remedy="mend them, or leave them out with data.on_error=skip",
                )
            if chunk:
                _write(parts, mine[turn], predictions, tally)
            bar.update(len(chunk))
            if turn + 1 < rounds and stopped(stop, together=engine.together):
                return False
    return True


def join(config: PredictConfig) -> int:
    """Return how many predictions are now in OUT, which appears whole."""
    out, parts = config.predict.out, parts_of(config.predict.out)
    total, size = _begun(parts)
    tallies = []
    with whole(out) as file:
        for number in range(-(-total // size)):
            content = read_file(_chunk(parts, number), most=1 << 34)
            lines, wanted = content.count(b"\n"), min(size, total - number * size)
            if lines != wanted:
                raise DataError(
                    "this part of the predictions was changed",
                    where=_chunk(parts, number),
                    value=f"{lines} of {wanted} lines",
                    remedy="remove it, then run the same command again",
                )
            tallies.append(_tally(parts, number))
            file.write(content)
    shutil.rmtree(parts)
    problems = sum(tally.problems for tally in tallies)
    truncated = sum(tally.truncated for tally in tallies)
    if problems:
        shown = list(chain.from_iterable(tally.shown for tally in tallies))[:SHOWN]
        logger.warning(
            f"{problems:,} of {counted(total, 'example')} have a problem instead of a "
            f"prediction, such as {'; '.join(shown)}"
        )
    if truncated:
        logger.warning(
            f"{truncated:,} of {counted(total, 'example')} were cut, as they are longer than "
            f"data.max_length={config.data.max_length}"
        )
    return total


def predict_texts(config: PredictConfig, example: Example) -> dict[str, Any]:
    """Return the prediction for one example.

    Raises:
        DataError: if there can be none.
    """
    with group.joined(World(), needed=config.engine.zero_stage == 3):
        engine, task = open_task(config)
        [made] = predict(task, engine, [example], batch=1) or []
        engine.close()
    if "problem" in made:
        raise DataError(
            made["problem"], where="command line", value={**example}, remedy="give another text"
        )
    return made


def _begun(parts: Path) -> tuple[int, int]:
    """Return how many examples there are, and in a chunk: as it was begun, since another
    ``predict.batch`` must not move the chunks.
    """
    key = _key(parts)
    return key["examples"], key["chunk"]


def _key(parts: Path) -> dict[str, Any]:
    what = "the record of half-made predictions"
    return load(parts / "key.json", _Asked, what=what, remedy="remove that folder").as_dict()


def _write(
    parts: Path, number: int, predictions: Sequence[Mapping[str, Any]], tally: _Tally
) -> None:
    """Write chunk ``number``; its tally first, so that a chunk that is there has one."""
    write_atomically(_tally_file(parts, number), tally.model_dump_json().encode())
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    write_atomically(_chunk(parts, number), lines.encode())


def _is_there(parts: Path, number: int) -> bool:
    return _chunk(parts, number).exists() and _tally_file(parts, number).exists()


def _tally(parts: Path, number: int) -> _Tally:
    what = "the record of a part of the predictions"
    remedy = "remove it, then run the same command again"
    return load(_tally_file(parts, number), _Tally, what=what, remedy=remedy)


def _tally_file(parts: Path, number: int) -> Path:
    return parts / f"{number:08}.json"


def _chunk(parts: Path, number: int) -> Path:
    return parts / f"{number:08}.jsonl"
