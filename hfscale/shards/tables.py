"""Rows of tables that others wrote: JSONL, csv, tsv, parquet, WebDataset tars and data sets of the hub, each row with its place."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any

from hfscale.errors import DataError
from hfscale.shards.raw import PICKLED, members_of

Rows = Iterator[tuple[str, Any]]


@contextmanager
def open_source(file: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacked if its name ends in .gz.

    Raises:
        DataError: while opening or reading it, if that cannot be done.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            yield stream  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read a source file: {getattr(error, 'strerror', None) or error}", where=file
        ) from None


# ------------------------------------------- readers of one file; ``column`` is the only one that is wanted, None: all
def _jsonl(file: Path, column: str | None) -> Rows:
    with open_source(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{file}:{number}"
                try:
                    yield (
                        where,
                        json.loads((line.decode("utf-8-sig") if number == 1 else line).rstrip()),
                    )
                except (ValueError, RecursionError) as error:
                    at = (
                        f"{error.msg} (character {error.colno})"
                        if isinstance(error, json.JSONDecodeError)
                        else str(error)
                    )
                    raise DataError(
                        f"not a JSON line: {at}",
                        where=where,
                        value=line.decode("utf-8", "replace").rstrip()[:80],
                        remedy="one JSON object a line, in UTF-8",
                    ) from None


def _lines(file: Path, column: str | None) -> Rows:
    with open_source(file) as stream:
        try:
            for number, line in enumerate(codecs.iterdecode(stream, "utf-8-sig"), start=1):
                yield f"{file}:{number}", {"text": line.rstrip("\r\n")}
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: {error}", where=file) from None


def _csv(file: Path, column: str | None, *, delimiter: str = ",") -> Rows:
    csv.field_size_limit(sys.maxsize)
    with open_source(file) as stream:
        rows = csv.DictReader(
            codecs.iterdecode(stream, "utf-8-sig"), delimiter=delimiter, strict=True
        )  # an open quote eats the rest
        try:
            for row in rows:
                yield f"{file}:{rows.line_num}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"not a readable csv row: {error}",
                where=f"{file}:{rows.line_num + 1}",
                remedy="a header line, commas, quotes that close, UTF-8",
            ) from None


def _parquet(file: Path, column: str | None) -> Rows:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file) as table:
            columns = [column] if column in table.schema_arrow.names else None
            batches = table.iter_batches(batch_size=1024, columns=columns)
            for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable parquet file: {error}", where=file) from None


def _webdataset(file: Path, column: str | None) -> Rows:
    """Yield the samples: the keys of JSON members and, by their extensions, the members that are text; the sample's key is its id."""
    with open(file, "rb") as stream:
        for key, members in members_of(file):
            where, row = f"{file}, sample {key}", dict[str, Any](id=key)
            for name, member in members.items():
                stream.seek(member.offset)
                payload = b"" if name in PICKLED else stream.read(member.size)
                try:
                    text = payload.decode("utf-8-sig")
                    row |= json.loads(text) if name.endswith("json") else {name: text}
                except UnicodeDecodeError:
                    continue  # an image, say: no column of text
                except (ValueError, TypeError) as error:
                    raise DataError(
                        f"not a JSON object: {error}", where=f"{where}, member {name}"
                    ) from None
            yield where, row


READERS: dict[str, Callable[[Path, str | None], Rows]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "tsv": partial(_csv, delimiter="\t"),
    "parquet": _parquet,
    "webdataset": _webdataset,
    "lines": _lines,
}
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".txt": "lines",
}


# ------------------------------------------------------------------------------------------------ a table by name
def table_files(name: str | Path) -> list[Path]:
    """Return the files of the table ``name`` (a file, a folder or a glob), sorted; none: then it can only be the hub's.

    Raises:
        DataError: if it can be nothing of the hub either.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    found = glob(str(path), recursive=True) if has_magic(str(path)) else map(str, path.rglob("*"))
    files = sorted(
        file
        for file in map(Path, found)
        if kind_of(file) and file.is_file() and not file.name.startswith(".")
    )
    no_hub_name = (
        has_magic(str(name))
        or path.is_absolute()
        or path.suffix in SUFFIXES
        or str(name).startswith(".")
        or len(path.parts) > 2
    )
    if not files and no_hub_name:
        raise DataError(
            "there is no such table",
            where="data",
            value=str(name),
            remedy=f"name a file ({', '.join(SUFFIXES)}), a folder or a glob: data.train=FILE; or --data FILE",
        )
    return files


def kind_of(file: Path) -> str | None:
    """Return the reader that the name of ``file`` asks for, ``.gz`` apart."""
    return SUFFIXES.get(Path(file.name.lower().removesuffix(".gz")).suffix)


def table_rows(name: str | Path, *, subset: str | None = None, split: str = "train") -> Rows:
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
                remedy=f"rename it: {', '.join(SUFFIXES)}",
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
                        remedy="put a cell that holds the delimiter between quotes, or mend the row",
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
        yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows))


def _rows_of(document: Any) -> list[Any]:
    """Return the rows of what stands on a line: itself, the members of a list, or the questions of SQuAD's own file (one line)."""
    with suppress(KeyError, TypeError):
        if asked := [
            {"context": part["context"], **question}
            for article in document["data"]
            for part in article["paragraphs"]
            for question in part["qas"]
        ]:
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
) -> Any:
    """Return ``NAME`` or ``NAME:SPLIT`` of the hub, from the cache or fetched.

    Raises:
        DataError: if it is no such thing.
    """
    from datasets import load_dataset

    repository, _, wanted = name.partition(":")
    try:
        return load_dataset(repository, subset, split=wanted or split, streaming=streaming)
    except Exception as error:  # datasets has no common class for what users get wrong
        first_line = str(error).strip().split("\n")[0]
        raise DataError(
            f"cannot open the data set: {first_line}",
            where=setting,
            value=name,
            remedy="a file or folder here, or a name of the hub (NAME:SPLIT): check it, the subset and the network",
        ) from error
