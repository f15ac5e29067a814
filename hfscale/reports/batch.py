"""The batch time machine: what a step of a run was trained on, rebuilt from the order alone, and
proven by its digest.

Needs the shards and the run directory, but no GPU, no weights and none of the other ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfscale import run_files
from hfscale.checkpoint.layout import newest_state
from hfscale.config.load import load_config
from hfscale.config.schema import RunConfig
from hfscale.errors import DataError
from hfscale.monitor.incidents import incidents, left_out
from hfscale.monitor.metrics_log import Logged
from hfscale.reports.status import records
from hfscale.run.sources import Sources
from hfscale.stream.digest import VERSION, digest_rows
from hfscale.stream.left_out import LeftOut
from hfscale.stream.mixture import Mixture
from hfscale.stream.prepared import RunRows
from hfscale.stream.rows import TokenRows
from hfscale.stream.text import TextRows, open_encoders
from hfscale.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_Place = tuple[str, int, str, tuple[int, ...]]  # shard, first token, member, documents


@dataclass(frozen=True)
class Row:
    """One row of a step: its place in the run's order and in the data, and its text. ``start``
    counts tokens of the shard.
    """

    position: int
    source: str
    shard: str
    start: int
    member: str
    # the first and last whose tokens it holds, numbered in the shard; none where it was skipped
    documents: tuple[int, ...]
    text: str
    ids: list[int]  # seq_len + 1


@dataclass(frozen=True)
class Step:
    """The rows of a step's global batch in the order of the run, and the digest of their ids beside
    the one that was logged.
    """

    rows: list[Row]
    digest: int
    logged: int | None  # None where this step was not logged
    version: int  # of both: 1, of older records, is of the inputs alone, without the last label


def ledger_of(run_dir: Path) -> LeftOut:
    """Return which rows the run leaves out, by its newest checkpoint and its incidents."""
    newest = newest_state(run_dir)
    saved = newest.position.left_out if newest else []
    return LeftOut([*saved, *left_out(incidents(run_dir))])


def rebuild(
    run_dir: Path, *, step: int, rows_of: tuple[int, ...] = (), whole: bool = False
) -> Step:
    """Return what step ``step`` (from 1) of a run was trained on; with ``whole`` also the rows that
    the run has left out of it since.

    ``rows_of`` are the step's positions (the first, and the one after the last) where an incident
    names them: of a step that was never logged, say.

    Raises:
        DataError: if the step lies outside the run, or the shards are not those of the run.
    """
    config = load_config(run_dir / run_files.CONFIG).config
    if not isinstance(config, RunConfig):
        raise DataError(
            "this run was not trained on shards",
            where=run_dir,
            remedy="its examples are in the files of its data section",
        )
    # of a step that was repeated, the last one counts
    logged = {record["step"]: record for record in records(run_dir)}
    if not logged and not rows_of:
        raise DataError(
            "this run has logged nothing yet",
            where=run_dir / run_files.METRICS,
            remedy="name a run directory that has trained",
        )
    start, stop = rows_of or _positions(logged, config, step, where=run_dir)
    # the newest state knows the weights of earlier attempts
    tokens, order = Sources(config).plan(newest_state(run_dir))
    tokenizer = load_tokenizer(config.tokenizer.path)
    data: RunRows = tokens
    text = None
    if order.raw:
        data = text = _text(config, tokens, order, tokenizer, run_dir, step=step, logged=logged)
    positions = np.arange(start, stop)
    places = order.locate(positions)
    ids_BL = np.empty((stop - start, config.data.seq_len + 1), np.int64)
    out = (LeftOut() if whole else ledger_of(run_dir)).mask(positions)
    prepared = data.prepare(places.shard, places.row, positions=positions, left_out=out)
    prepared.fill(slice(0, len(positions)), ids_BL)
    sources = tokens.source_of(places.shard).tolist()
    rows = []
    for k, (shard, row) in enumerate(zip(places.shard.tolist(), places.row.tolist(), strict=True)):
        valid = bool(prepared.valid[k])
        if text and k in text.pieces:
            place: _Place = text.locate(k)
        elif valid or out[k]:
            place = tokens.locate(shard, row)
        else:
            place = tokens.shard(shard)[1].name, row * tokens.seq_len, "damaged", ()
        words = str(tokenizer.decode(ids_BL[k, :-1].tolist()))
        if not valid:
            words = "(left out)" if out[k] else "(skipped)"
        rows.append(Row(start + k, order.names[sources[k]], *place, words, ids_BL[k].tolist()))
    data.close()
    record = logged.get(step, {})
    version = record.get("digest_version", 1 if record else VERSION)
    digest = digest_rows(ids_BL[:, :-1] if version == 1 else ids_BL)
    return Step(rows, digest, record.get("batch_digest"), version)


def _text(
    config: RunConfig,
    tokens: TokenRows,
    order: Mixture,
    tokenizer: PreTrainedTokenizerFast,
    run_dir: Path,
    *,
    step: int,
    logged: Mapping[int, Logged],
) -> TextRows:
    """Return the rows of a run with raw text: its lanes are walked from the nearest checkpoint
    on.
    """
    saved, newest = newest_state(run_dir, before=step), newest_state(run_dir)
    if newest:
        older = newest.position.text == 1
    else:
        older = any("digest_version" not in record for record in logged.values())
    return TextRows(
        tokens,
        order,
        open_encoders(config, tokenizer, forged=older),
        global_batch=config.train.global_batch,
        state=saved.position if saved else None,
    )


def _positions(
    logged: Mapping[int, Logged], config: RunConfig, step: int, *, where: Path
) -> tuple[int, int]:
    """Return the positions [start, stop) of a step, from the log where it is there:
    ``global_batch`` may have changed on the way.
    """
    if step < 1:
        raise DataError("steps count from 1", where="--step", value=step)
    last = max(logged, default=0)
    if step > last:
        raise DataError(
            "this run has not come to that step",
            where=where,
            value=step,
            remedy=f"its last logged step is {last}",
        )

    rows = {number: one["tokens_seen"] // config.data.seq_len for number, one in logged.items()}
    rows[0] = 0
    steps = sorted(rows)
    after = min(number for number in steps if number >= step)
    before = max(number for number in steps if number < step)
    batch = _between(rows, before, after)
    if after == step and before == step - 1:
        return rows[before], rows[after]
    beside = [
        _between(rows, *pair)
        for pair in zip(steps, steps[1:], strict=False)
        if before in pair or after in pair
    ]
    one_start = before == 0 or logged[before].get("attempt") == logged[after].get("attempt")
    if batch is None or not (one_start or all(other == batch for other in beside)):
        raise DataError(
            f"the run went on with another global batch between steps {before} and {after}",
            where=where,
            value=step,
            remedy="which rows this step had is not known: name a step that was logged next to "
            "another "
            "(metrics.every_steps=1 logs all)",
        )
    return rows[before] + (step - 1 - before) * batch, rows[before] + (step - before) * batch


def _between(rows: Mapping[int, int], before: int, after: int) -> int | None:
    """Return the global batch of the steps from one logged step to the next; None: not all had the
    same.
    """
    batch, rest = divmod(rows[after] - rows[before], after - before)
    return None if rest else batch
