"""The sources of a config opened as one: their rows joined, and the order of them, also where a
checkpoint left off.

What a run has read cannot change: sources keep the numbers that they had, and new weights begin at
the end of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hfscale import run_files
from hfscale.config.rules import Length, nearest_text, run_length
from hfscale.config.schema import RunConfig, Source
from hfscale.errors import ConfigError, DataError
from hfscale.shards.manifest import Manifest
from hfscale.stream.mixture import ALONE, Mixture, Phase, plan, share
from hfscale.stream.order import AUTO_LANES, Order, key_of
from hfscale.stream.rows import TokenRows
from hfscale.stream.state import Saved, StreamState

_SOURCES = 3  # purpose of a key; order.py and mixture.py have the others


def open_mixture(
    config: RunConfig, parts: Sequence[TokenRows], *, saved: Saved | None = None
) -> tuple[TokenRows, Mixture]:
    """Return the rows of ``data.sources`` (``parts``, in the order of the config) joined, and their
    order.

    ``saved`` is the state of the checkpoint that the run goes on from. Sources keep the numbers
    that they had there; new ones follow.

    Raises:
        ConfigError: if a weight is too small for the block, a stage comes out of order, or the
            sources do not last for the run.
        DataError: if a source of the checkpoint is gone or has other data.
    """
    data = config.data
    state = saved.position if saved else None
    given = {source.name: (source, part) for source, part in zip(data.sources, parts, strict=True)}
    _refuse_unlike_dtypes({name: part for name, (_, part) in given.items()})
    manifests = {name: part.manifest for name, (_, part) in given.items()}
    names = list(dict.fromkeys([*_known(state, manifests, config.run_dir), *given]))
    sources, rows = zip(*(given[name] for name in names), strict=True)
    raw = [number for number, part in enumerate(rows) if part.raw]
    orders = _orders(config, sources, rows, state)
    phases, end = _phases(config, sources, orders, saved)
    mixture = Mixture(
        orders,
        fingerprints={name: part.fingerprint for name, part in zip(names, rows, strict=True)},
        phases=phases,
        end=end,
        raw=raw,
    )
    return TokenRows.joined(rows), mixture


def _refuse_unlike_dtypes(parts: Mapping[str, TokenRows]) -> None:
    dtypes = {part.manifest.dtype: name for name, part in parts.items() if not part.raw}
    if len(dtypes) > 1:
        raise DataError(
            "the sources have ids of unlike dtypes",
            where="data.sources",
            value=dtypes,
            remedy="one tokenizer gives one dtype: build the shards again with the run's",
        )


def _orders(
    config: RunConfig,
    sources: Sequence[Source],
    parts: Sequence[TokenRows],
    state: StreamState | None,
) -> list[Order]:
    """Return the order of each source: its own seed, and lanes that suit raw text where it is."""
    data = config.data
    texts = [(source, part) for source, part in zip(sources, parts, strict=True) if part.raw]
    lanes_of_text = _lanes_of_text(config, texts, state) if texts else None
    orders = []
    for number, part in enumerate(parts):
        seed = config.run.seed
        if number:
            seed = int(key_of(config.run.seed, number, _SOURCES)[0])
        lanes = lanes_of_text if part.raw and lanes_of_text else data.lanes
        orders.append(Order(part.shard_rows, seed=seed, lanes=lanes, block=data.block))
    return orders


def _phases(
    config: RunConfig, sources: Sequence[Source], orders: Sequence[Order], saved: Saved | None
) -> tuple[list[Phase], int | None]:
    """Return which source gives how many rows of a block from which row of the run on, and the row
    at which all have given their ``max_epochs``, if they do.

    Raises:
        ConfigError: as ``open_mixture``.
    """
    data, train = config.data, config.train
    state = saved.position if saved else None
    step, consumed = (saved.step, state.consumed_rows) if saved and state else (0, 0)
    length = run_length(
        train,
        rows=sum(order.rows for order in orders),
        seq_len=data.seq_len,
        step=step,
        consumed_rows=consumed,
    )
    stages = _stages(config, sources, length, step=step, consumed=consumed)
    caps = [
        None if source.max_epochs is None else int(source.max_epochs * order.rows)
        for source, order in zip(sources, orders, strict=True)
    ]
    past = [Phase(begin, tuple(counts)) for begin, counts in state.phases] if state else []
    phases, end = plan(
        stages,
        block=data.block if len(sources) > 1 else 1,
        caps=caps,
        consumed=consumed,
        past=past or [ALONE],  # a run of one source can turn into a mixture at any row
    )
    if end is not None and consumed + (length.steps - step) * train.global_batch > end:
        raise ConfigError(
            "every source has given its max_epochs after step "
            f"{step + (end - consumed) // train.global_batch} of {length.steps}",
            where="data.sources",
            remedy="give more epochs or more data, or fewer train.steps",
        )
    return phases, end


def _stages(
    config: RunConfig, sources: Sequence[Source], length: Length, *, step: int, consumed: int
) -> list[tuple[int, list[float]]]:
    """Return the row at which each stage begins, and the weight of each source from there on.

    Raises:
        ConfigError: if a stage comes out of order, or a weight gives no row in a block.
    """
    data, global_batch = config.data, config.train.global_batch
    weights = {source.name: source.weight for source in sources}
    stages, last = [(0, list(weights.values()))], 0.0
    for number, stage in enumerate(data.stages):
        at: float = stage.at
        if isinstance(stage.at, float):  # of the rows of the whole run
            at = round(stage.at * (length.steps + length.shift)) - length.shift
        if at <= last:
            raise ConfigError(
                "a stage must begin after the one before it",
                where=f"data.stages.{number}.at",
                value=f"step {at:g}",
                remedy=f"of {length.steps} steps, give one after {last:g}",
            )
        weights, last = weights | stage.weights, at
        stages.append((consumed + round((at - step) * global_batch), list(weights.values())))
    for number, (_, values) in enumerate(stages):
        rows = share(values, data.block, [None] * len(sources))
        for name, weight, count in zip(weights, values, rows, strict=True):
            if weight > 0 and count == 0:
                raise ConfigError(
                    f"the weight of {name} is too small: it gives no row in a block of "
                    f"{data.block}",
                    value=weight,
                    where=f"data.stages.{number - 1}.weights" if number else "data.sources",
                    remedy="give a larger weight or data.block, or weight 0",
                )
    return stages


def _lanes_of_text(
    config: RunConfig, sources: Sequence[tuple[Source, TokenRows]], state: StreamState | None
) -> int:
    """Return the lanes of a run that reads raw text.

    Raises:
        ConfigError: if they do not divide the global batch, a source has no sample for each, or the
            run's length is given in epochs.
    """
    epochs = [
        f"max_epochs of source {source.name}"
        for source, _ in sources
        if source.max_epochs is not None
    ]
    if config.train.epochs is not None or epochs:
        raise ConfigError(
            "how many rows raw text has is not known before it is tokenized",
            where=[*epochs, "train.epochs"][0],
            remedy="give train.steps or train.tokens and no max_epochs, or make token shards: "
            "`hfscale shards build CONFIG`",
        )
    batch = config.train.global_batch
    lanes = state.lanes if state is not None else config.data.lanes
    samples = int(min(rows.shard_rows.sum() for _, rows in sources))
    fit = [n for n in range(1, min(batch, samples) + 1) if batch % n == 0]
    if lanes == "auto":
        return max(n for n in fit if n <= AUTO_LANES)
    if lanes not in fit:
        where, value = ("data.lanes", lanes) if state is None else ("train.global_batch", batch)
        near = fit if state is None else [batch // lanes * lanes, -(-batch // lanes) * lanes]
        raise ConfigError(
            "raw text needs lanes that divide the global batch, and a sample of each source "
            "for each lane",
            where=where,
            value=f"{lanes} lanes, global batch {batch}, {samples:,} samples",
            remedy=f"{where}={nearest_text(near, value)}",
        )
    return lanes


def kept_manifest(run_dir: Path, fingerprint: str) -> Path:
    """Return the folder where a run keeps a copy of a source's manifest, to say what has changed if
    it is resumed on other data.
    """
    return run_dir / run_files.DATA / fingerprint[:12]


def _known(state: StreamState | None, given: Mapping[str, Manifest], run_dir: Path) -> list[str]:
    """Return the names of the sources that a checkpoint has seen, in its order, after checking that
    they are here and the same.
    """
    if state is None:
        return []
    seen = {name: print_ for name, (print_, _) in state.sources.items()}
    if not seen:  # a run of one source, under any name
        same = (
            name for name, manifest in given.items() if manifest.fingerprint == state.fingerprint
        )
        seen = {next(same, next(iter(given))): state.fingerprint}
    for name, print_ in seen.items():
        if name not in given:
            raise DataError(
                f"source {name} of the checkpoint is gone",
                where="data.sources",
                value=[*given],
                remedy="give it back; weight 0 stops reading a source",
            )
        if not (now := given[name]).fingerprint.startswith(print_):
            kept = kept_manifest(run_dir, print_)
            raise DataError(
                f"source {name} of the checkpoint has other data",
                where=f"data.sources, {now.folder}",
                value=Manifest.load(kept).changes(now)
                if kept.is_dir()
                else f"{print_[:12]} then, {now.fingerprint[:12]} now",
                remedy="give back the data as it was; other data take a source of their own",
            )
    return list(seen)
