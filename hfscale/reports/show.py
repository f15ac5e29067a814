"""What a config comes to: every value with its source, and the numbers that follow from several of
them. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hfscale.config.corpus import CorpusConfig
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.load import Loaded, flatten, json_schema, load_config, read_tree
from hfscale.config.rules import notices, solve_batch
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.config.section import Section
from hfscale.errors import shown
from hfscale.run.run import Run


def schema_of(path: Path | str, overrides: Sequence[str] = ()) -> type[Section]:
    """Return which kind of config a file is, by the section that only that kind has."""
    sections = read_tree(path, overrides).values.keys()
    return (
        CorpusConfig
        if {"source", "shards"} & sections
        else FinetuneConfig
        if "task" in sections
        else RunConfig
    )


def show_schema(path: Path | str | None = None) -> str:
    """Return the JSON schema of a run's config, or of the kind that ``path`` is."""
    return json.dumps(json_schema(schema_of(path) if path else RunConfig), indent=2)


def show_config(
    path: Path | str, overrides: Sequence[str] = (), *, procs: int | None = None
) -> str:
    """Return a table of key, value and source, then the derived numbers.

    Raises:
        ConfigError: for everything that is wrong with the config, and for a batch that ``procs``
            ranks cannot share.
    """
    loaded: Loaded[Section] = load_config(path, overrides, schema=schema_of(path, overrides))
    rows = [
        (key, _text(value), loaded.source(key))
        for key, value in flatten(loaded.config.model_dump(mode="json", by_alias=True))
    ]
    facts = derived(loaded.config, procs=procs) if isinstance(loaded.config, TrainConfig) else []
    return "\n".join([*_columns(rows), *(["", *_columns(facts)] if facts else [])])


def derived(config: TrainConfig, *, procs: int | None = None) -> list[tuple[str, str]]:
    """Return ``(name, value)`` of what the config implies; data that is not there yet leaves its
    numbers out.
    """
    train, seq_len = config.train, config.data.seq_len
    facts = [
        ("run directory", f"{config.run_dir} ({'exists' if config.run_dir.exists() else 'new'})")
    ]
    if procs is not None:
        facts.append(
            (
                "batch",
                solve_batch(
                    train.global_batch, micro_batch=train.micro_batch, data_size=procs
                ).equation,
            )
        )
    else:
        fitting = [
            size
            for size in (2**power for power in range(11))
            if train.global_batch % (size * train.micro_batch) == 0
        ]
        steps = [str(train.global_batch // size // train.micro_batch) for size in fitting]
        sizes = ", ".join(map(str, fitting))
        facts.append(("batch", f"accumulation {', '.join(steps)} on world_size {sizes}"))
    if isinstance(config, FinetuneConfig):  # how many examples there are, only reading them shows
        return [
            *facts,
            ("steps", str(train.steps or f"{train.epochs} epochs")),
            *(("notice", line) for line in notices(config)),
        ]
    facts.append(("tokens a step", f"{train.global_batch * seq_len:,}"))
    run = Run(config)
    assert run.sources
    unknown = run.sources.unknown()
    rows = 0 if unknown else run.sources.rows
    length = run.length(rows)
    later = f"not known before {unknown}"
    if length is None:
        facts += [("steps", later), ("epochs", later)]
    else:
        # of a run that goes on, perhaps with another batch
        step, read = (run.saved.step, run.saved.position.consumed_rows) if run.saved else (0, 0)
        in_all = read + (length.steps - step) * train.global_batch
        epochs = f"{round(in_all / rows, 3):,g} of {rows:,} rows" if rows else later
        facts += [("steps", f"{length.steps:,}"), ("tokens", f"{in_all * seq_len:,}")]
        facts.append(("epochs", epochs))
    lines = notices(config, rows=rows, length=length)
    return [*facts, *(("notice", line) for line in lines)]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the rows as lines with aligned columns; one long value does not push the others
    away.
    """
    rows = [tuple(map(shown, row)) for row in rows]
    widths = [min(48, max(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
