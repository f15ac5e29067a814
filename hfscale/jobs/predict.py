"""Predictions for a table: JSONL out, in order, sharded over processes, and resumed after a kill
without repeats or losses.

    .OUT.parts/config.yaml     what is asked for; every process reads it (else beside OUT)
    .OUT.parts/key.json        what the predictions depend on: only the same question goes on here
    .OUT.parts/00000012.jsonl  chunk 12, whole or absent: it is written under another name first
    .OUT.parts/00000012.json   how many of its predictions are problems, or of cut texts
    OUT                        all chunks, end to end; then they go

Process r of n makes every n-th chunk, if it is not there. At ZeRO stage 3 the processes go through
their chunks together; otherwise they say nothing to each other. Process 0 waits for the chunks of
all and joins them; where they answer questions whose answers are known, it scores them as well.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hfscale import run_files
from hfscale.config.inference import PredictConfig
from hfscale.dist import group
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import DataError, counted
from hfscale.jobs.asked import examples_of, key_of
from hfscale.jobs.evaluate import keep, score
from hfscale.log import logger, progress_bar
from hfscale.objectives.base import Setting, check_options
from hfscale.records import Count, Record, load, read_file
from hfscale.run.look import something_there
from hfscale.run.model import find
from hfscale.shards.files import cannot_write, whole, write_atomically
from hfscale.tasks.base import Example, Task
from hfscale.tasks.table import task_class
from hfscale.training.predictor import predict, stopped

POLL_S = 0.1  # between looks whether others have made their chunks
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
    def of(cls, predictions: Sequence[Mapping[str, object]]) -> _Tally:
        """Return what is to be said of ``predictions``."""
        bad = [row for row in predictions if "problem" in row]
        return cls(
            problems=len(bad),
            truncated=sum("truncated" in row for row in predictions),
            shown=[f"{row['id']}: {row['problem']}" for row in bad[:SHOWN]],
        )


def prepare(config: PredictConfig) -> int:
    """Return how many examples there are: all were read once, and nothing is wrong with them. The
    folder of parts is there, new or half filled; or OUT is, made by a job of the cluster from the
    same question.

    Raises:
        DataError: for bad rows, an OUT that exists, and parts of predictions of something else.
    """
    out, key = config.predict.out, key_of(config, find(config.predict.model))
    file = run_files.parts_of(out) / run_files.ASKED
    if out.exists():
        if file.is_file() and _key(file.parent).key == key:
            return _begun(file.parent)[0]
        raise something_there(out)
    count, size = sum(1 for _ in examples_of(config)), max(CHUNK, config.predict.batch)
    if not count:
        raise DataError(
            "there are no examples", where=config.data.train, remedy="give at least one row"
        )
    parts = run_files.parts_of(out)
    saved = _key(parts) if file.is_file() else None
    asked = _Asked(key=key, examples=count, chunk=size)
    # without a chunk what was asked first was refused, or stopped, before anything was made
    if saved and saved.key == key:
        asked = asked.model_copy(update={"chunk": saved.chunk})
    elif saved and any(parts.glob("0*.jsonl")):
        differ = [name for name in key if saved.key.get(name) != key[name]]
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
    write_atomically(file, json.dumps(asked.as_dict()).encode())
    return count


def check(config: PredictConfig) -> None:
    """Return if the model can be what the task asks for; nothing is read of the weights.

    Raises:
        UserError: if it cannot.
    """
    kind = task_class(config.task.name)
    options = check_options(kind.Options, config.task.options, where="task.options")
    task = kind(options, Setting(seq_len=config.data.max_length))
    find(config.predict.model).check_head(task.auto_model)


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
    """Return True when all that is this process's to make is there, False when it was stopped
    before.
    """
    out = config.predict.out
    alone = world.all.size == 1  # a launcher speaks for its ranks
    stop.listen(say="stopping after this batch: what is whole is kept" if alone else None)
    left = [] if out.exists() else _left(run_files.parts_of(out))
    # chunks that are gone may have been joined just now
    if left and not out.exists() and not _make_chunks(config, world, stop, left):
        return False
    if world.all.rank > 0:
        return True
    if not out.exists():
        if not _whole(run_files.parts_of(out), stop):
            return False
        join(config)
    if config.predict.answers:
        model = find(config.predict.model)
        scores = score(config, out, model=model, name=config.predict.name)
        keep(out.parent, model, scores)
    return True


def _left(parts: Path) -> list[int]:
    """Return the chunks that nobody has made yet."""
    total, size = _begun(parts)
    return [number for number in range(-(-total // size)) if not _is_there(parts, number)]


def _whole(parts: Path, stop: StopRequest) -> bool:
    """Return True once all chunks are there, whoever makes them; False when stopped before."""
    while _left(parts):
        if stop.requested:
            return False
        os.utime(parts)  # NFS: then the client asks the server anew what is there
        time.sleep(POLL_S)
    return True


def _make_chunks(
    config: PredictConfig, world: World, stop: StopRequest, left: Sequence[int]
) -> bool:
    """Return True when this process's share of the chunks that are ``left`` is made, False when it
    was stopped before.
    """
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
    """Return as ``_make_chunks``."""
    parts = run_files.parts_of(config.predict.out)
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


def join(config: PredictConfig) -> None:
    """Return when OUT is there, whole, and its chunks are gone."""
    out, parts = config.predict.out, run_files.parts_of(config.predict.out)
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
    for number in range(-(-total // size)):
        _chunk(parts, number).unlink()
        _tally_file(parts, number).unlink()
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


def predict_texts(config: PredictConfig, example: Example) -> dict[str, object]:
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
    return key.examples, key.chunk


def _key(parts: Path) -> _Asked:
    what = "the record of half-made predictions"
    return load(parts / run_files.ASKED, _Asked, what=what, remedy="remove that folder")


def _write(
    parts: Path, number: int, predictions: Sequence[Mapping[str, object]], tally: _Tally
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
