"""A table by name: a file, a folder, a glob, or a data set of the hub; its files, its rows and what
names its content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import cache
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING

from hfscale.errors import DataError
from hfscale.hub import asked_once
from hfscale.log import logger
from hfscale.shards.classes import class_names, with_names
from hfscale.shards.formats import READERS, SUFFIXES, kind_of, unread_kind
from hfscale.shards.listing import files_below, split_glob
from hfscale.shards.text_files import open_source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def table_files(name: str | Path) -> list[Path]:
    """Return the files of the table ``name`` (a file, a folder or a glob), sorted; none: then it
    can only be the hub's.

    In a folder files of plain text are left out, with a notice, where there are tables beside them:
    a README, a licence.

    Raises:
        DataError: if it can be nothing of the hub either, or is a data set that ``save_to_disk``
            wrote.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    root, pattern = split_glob(path) or (path, "**")
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        raise DataError(
            "this folder was written by save_to_disk of `datasets`, which is not read",
            where=root,
            remedy="write it as parquet: "
            "datasets.load_from_disk(FOLDER).to_parquet('FILE.parquet'), "
            "of several splits each: load_from_disk(FOLDER)['train'].to_parquet(...)",
        )
    try:
        names, others = files_below(root, [pattern]) if root.is_dir() else ([], [])
    except ValueError as error:
        raise DataError(f"not a pattern: {error}", where="data", value=str(name)) from None
    files = [root / name for name in names if kind_of(Path(name))]
    if lost := [name for name in others if kind_of(Path(name))]:
        raise DataError(
            "a table is a link that leads nowhere, or no file",
            where=root,
            value=lost[:3],
            remedy="mend or remove it",
        )
    texts = [file for file in files if kind_of(file) == "lines"]
    if len(texts) < len(files) and pattern == "**" and texts:
        left = ", ".join(file.name for file in texts[:3])
        _say_once(f"{root}: plain text beside tables is left out: {left}")
        files = [file for file in files if file not in texts]
    if not files and not _may_be_of_hub(str(name)):
        unread = [name for name in names if unread_kind(Path(name))]
        value, remedy = str(name), None
        if unread:
            value, remedy = f"{root}: {', '.join(unread[:3])}", unread_kind(Path(unread[0]))
        raise DataError(
            "there is no table that can be read" if names else "there is no such table",
            where="data",
            value=value,
            remedy=remedy
            or f"name a file ({', '.join(SUFFIXES)}), a folder or a glob: data.train=FILE; or "
            "--data FILE",
        )
    return files


def _may_be_of_hub(name: str) -> bool:
    """Return whether the hub could have a data set ``name``."""
    path = Path(name)
    here = has_magic(name) or path.is_absolute() or path.is_dir() or name.startswith(".")
    return not here and path.suffix not in SUFFIXES and len(path.parts) <= 2


@cache
def _say_once(line: str) -> None:
    logger.warning(line)


def table_rows(
    name: str | Path, *, subset: str | None = None, split: str = "train"
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (place, row) of all rows of a table here, or of ``NAME`` or ``NAME:SPLIT`` of the hub.

    Raises:
        DataError: if there is none, or it cannot be read; a file is named with its line.
    """
    files = table_files(name)
    for file in files:
        if (kind := kind_of(file)) is None:
            raise DataError(
                "the name of this file does not say how to read it",
                where=file,
                remedy=unread_kind(file) or f"rename it: {', '.join(SUFFIXES)}",
            )
        for where, row in (
            (where, row)
            for where, document in READERS[kind](file, None)
            for row in _rows_of(document)
        ):
            if not isinstance(row, dict) or None in row:
                if isinstance(row, dict):
                    raise DataError(
                        "a row has more cells than the header",
                        where=where,
                        value=str(row)[:80],
                        remedy="put a cell that holds the delimiter between quotes, or mend "
                        "the row",
                    )
                raise DataError(
                    "a row is no object with named fields",
                    where=where,
                    value=str(row)[:80],
                    remedy="one JSON object a line",
                )
            yield where, row
    if not files:
        rows = hub_dataset(str(name), subset=subset, split=split)
        named = class_names(rows.features.arrow_schema)
        for number, row in enumerate(rows):
            yield f"{name}, row {number}", with_names(row, named)


def _rows_of(document: object) -> list[object]:
    """Return the rows of what stands on a line: itself, the members of a list, or the questions of
    SQuAD's own file (one line).
    """
    articles = document.get("data", ()) if isinstance(document, dict) else ()
    with suppress(KeyError, TypeError):
        asked: list[object] = [
            {"context": part["context"], **question}
            for article in articles
            for part in article["paragraphs"]
            for question in part["qas"]
        ]
        if asked:
            return asked
    return document if isinstance(document, list) else [document]


def table_digest(name: str | Path, *, subset: str | None = None, split: str = "train") -> str:
    """Return what names the content of a table, wherever it lies."""
    digest = hashlib.blake2b(digest_size=16)
    files = table_files(name)
    for file in files:
        with open_source(file) as stream:
            digest.update(f"{kind_of(file)}\n".encode())
            while block := stream.read(1 << 20):
                digest.update(block)
    if not files:
        digest.update(hub_dataset(str(name), subset=subset, split=split)._fingerprint.encode())
    return digest.hexdigest()


def hub_dataset(
    name: str, *, subset: str | None, split: str, streaming: bool = False, setting: str = "data"
) -> Dataset | IterableDataset:
    """Return ``NAME`` or ``NAME:SPLIT`` of the hub, from the cache or fetched.

    Raises:
        DataError: if it is no such thing.
    """
    from datasets import load_dataset

    repository, _, wanted = name.partition(":")
    try:
        with asked_once(repository) if not Path(repository).exists() else nullcontext():
            return load_dataset(repository, subset, split=wanted or split, streaming=streaming)
    except Exception as error:  # datasets has no common class for what users get wrong
        first_line = str(error).strip().split("\n")[0]
        if "load_from_disk" in str(error):
            raise DataError(
                "this folder was written by save_to_disk of `datasets`, which is not read",
                where=setting,
                value=name,
                remedy="write it as parquet: "
                "datasets.load_from_disk(FOLDER).to_parquet('FILE.parquet')",
            ) from error
        raise DataError(
            f"cannot open the data set: {first_line}",
            where=setting,
            value=name,
            remedy="a file or folder here, or a name of the hub (NAME:SPLIT): check it, the "
            "subset and the network",
        ) from error
