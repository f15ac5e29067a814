"""Readers of one file that others wrote: JSONL, csv, tsv, parquet, a WebDataset tar, plain text;
each row with its place.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from hfscale.errors import DataError
from hfscale.records import open_file
from hfscale.shards.classes import class_names, with_names
from hfscale.shards.raw import members_of, too_large
from hfscale.shards.tars import PICKLED
from hfscale.shards.text_files import BYTE_ORDERS, lines_of, open_source, open_table

if TYPE_CHECKING:
    import pyarrow

Rows = Iterator[tuple[str, object]]
DEPTH = 200  # levels of JSON in a row
HUGE = 1 << 28  # bytes of a row that nobody has set a limit for


def distinct_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object; a key that is there twice is an error, where Python would take the
    last.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return content


def _json(text: str | bytes) -> object:
    """Return what a row of JSON says.

    Raises:
        ValueError: if it is none, has a key twice, or lists in lists that no code that follows
            could walk.
    """
    value = json.loads(text, object_pairs_hook=distinct_keys)
    nested = (
        text.count("[") + text.count("{")
        if isinstance(text, str)
        else text.count(b"[") + text.count(b"{")
    )
    if nested <= DEPTH:
        return value
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        inner = [node.values() if isinstance(node, dict) else node for node in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {DEPTH} levels")


# readers of one file; ``column`` is the only one that is wanted, None: all; ``most``: bytes of a
# row
def _jsonl(file: Path, column: str | None, most: int = HUGE) -> Rows:
    with open_table(file) as (stream, encoding):
        if encoding == "utf-16":
            lines: Iterator[bytes] = (
                line.encode() for line in lines_of(stream, file, encoding=encoding, most=most)
            )
        else:
            lines = iter(lambda: stream.readline(most + 1), b"")
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            if len(line) > most:
                raise too_large(where, len(line), most)
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig") if number == 1 else line
                yield where, _json(text.rstrip())
            except (ValueError, RecursionError) as error:
                if number == 1 and (whole := _over_lines(file, most)) is not None:
                    members = whole if isinstance(whole, list) else [whole]
                    yield from ((f"{file}, row {n}", row) for n, row in enumerate(members))
                    return
                raise _not_json(error, line, where) from None


def _over_lines(file: Path, most: int) -> object:
    """Return what a file of JSON over several lines holds, or None where it is no such file or too
    large to be held.
    """
    with open_source(file) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        return None
    with suppress(ValueError, RecursionError):
        encoding = BYTE_ORDERS.get(data[:2], "utf-8-sig")
        return _json(data.decode(encoding))
    return None


def _not_json(error: Exception, line: bytes, where: str) -> DataError:
    at = (
        f"{error.msg} (character {error.colno})"
        if isinstance(error, json.JSONDecodeError)
        else str(error)
    )
    return DataError(
        f"not a JSON line: {at}",
        where=where,
        value=line[:400].decode("utf-8", "replace").rstrip()[:80],
        remedy="one JSON object a line, or a whole file of JSON that is closed, in UTF-8",
    )


def _lines(file: Path, column: str | None, most: int = HUGE) -> Rows:
    with open_table(file) as (stream, encoding):
        lines = lines_of(stream, file, encoding=encoding, most=most)
        for number, line in enumerate(lines, start=1):
            yield f"{file}:{number}", {"text": line.rstrip("\r\n")}


def _csv(file: Path, column: str | None, most: int = HUGE, *, delimiter: str = ",") -> Rows:
    csv.field_size_limit(min(most, sys.maxsize))
    with open_table(file) as (stream, encoding):
        lines = lines_of(stream, file, encoding=encoding, most=most)
        first = next(lines, "")
        if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel says it so
            delimiter, first = first[4], next(lines, "")
        if not first.endswith("\r"):  # then `\r` ends no line: it is a part of a cell, or a mistake
            lines = _to_line_feeds(lines, file, most)
        if delimiter not in first:
            delimiter = next((sign for sign in ";\t" if sign in first), delimiter)
        # an open quote eats the rest
        rows = csv.DictReader(
            chain([first] if first else [], lines), delimiter=delimiter, strict=True
        )
        try:
            header = [name for name in rows.fieldnames or [] if name]
            if twice := [name for name in header if header.count(name) > 1]:
                raise DataError(
                    "two columns have one name",
                    where=f"{file}:{rows.line_num}",
                    value=twice[0],
                    remedy="rename one of them, or take it out",
                )
            for row in rows:
                yield f"{file}:{rows.line_num}", row
        except csv.Error as error:
            raise DataError(
                f"not a readable csv row: {error}",
                where=f"{file}:{rows.line_num + 1}",
                remedy="a header line, commas (or semicolons, or tabs), quotes that close, UTF-8",
            ) from None


def _to_line_feeds(lines: Iterator[str], file: Path, most: int) -> Iterator[str]:
    """Yield the lines with those that end in ``\\r`` alone joined to what follows."""
    held = ""
    for line in lines:
        held += line
        if len(held) > most:
            raise too_large(file, len(held), most)
        if not line.endswith("\r"):
            yield held
            held = ""
    if held:
        yield held


def _parquet(file: Path, column: str | None, most: int = HUGE) -> Rows:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(
                    "two columns have one name",
                    where=file,
                    value=twice[0],
                    remedy="rename one of them",
                )
            columns = [column] if column is not None and column in names else None
            named, number = class_names(table.schema_arrow), 0
            for group in range(table.num_row_groups):
                size = _row_bytes(table.metadata.row_group(group), columns)
                if size > most:
                    raise too_large(f"{file}, row {number}", size, most)
                for batch in table.iter_batches(
                    batch_size=max(1, min(1024, BATCH_BYTES // max(1, size))),
                    row_groups=[group],
                    columns=columns,
                ):
                    for row in batch.to_pylist():
                        yield f"{file}, row {number}", with_names(row, named)
                        number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable parquet file: {error}", where=file) from None


BATCH_BYTES = 1 << 24  # of parquet that are made Python objects at once


def _row_bytes(group: pyarrow.RowGroupMetaData, columns: list[str] | None) -> int:
    """Return the bytes of a row of a row group of parquet, on average."""
    parts = [group.column(number) for number in range(group.num_columns)]
    wanted = [
        part.total_uncompressed_size
        for part in parts
        if columns is None or part.path_in_schema.split(".")[0] in columns
    ]
    return int(sum(wanted) // max(1, group.num_rows))


def _webdataset(file: Path, column: str | None, most: int = HUGE) -> Rows:
    """Yield the samples: the keys of JSON members and, by their extensions, the members that are
    text; the sample's key is its id.
    """
    with open_file(file) as stream:
        for key, members in members_of(file):
            where, row = f"{file}, sample {key}", dict[str, object](id=key)
            for name, member in members.items():
                stream.seek(member.offset)
                payload = b"" if name in PICKLED else stream.read(member.size)
                try:
                    text = payload.decode("utf-8-sig")
                    cells = _json(text) if name.endswith("json") else {name: text}
                    if not isinstance(cells, dict):
                        raise TypeError(f"{cells!r:.60}")
                    if twice := cells.keys() & row.keys() - {"id"}:
                        raise ValueError(f"{min(twice)!r} is there twice in the sample")
                    row |= cells
                except UnicodeDecodeError:
                    continue  # an image, say: no column of text
                except (ValueError, TypeError, AttributeError, RecursionError) as error:
                    raise DataError(
                        f"not a JSON object: {error}", where=f"{where}, member {name}"
                    ) from None
            yield where, row


READERS: dict[str, Callable[..., Rows]] = {
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


def kind_of(file: Path) -> str | None:
    """Return the reader that the name of ``file`` asks for, ``.gz`` apart."""
    return SUFFIXES.get(Path(file.name.lower().removesuffix(".gz")).suffix)


def unread_kind(file: Path) -> str | None:
    """Return what to do with a kind of table that is not read, by its name."""
    suffix = file.suffix.lower()
    if suffix in (".xlsx", ".xls", ".ods", ".numbers"):
        return "a spreadsheet: save it as csv (in Excel: CSV UTF-8)"
    if suffix in (".arrow", ".feather"):
        return "write it as parquet: datasets.Dataset.from_file(FILE).to_parquet('FILE.parquet')"
    if suffix in (".zst", ".xz", ".bz2", ".zip", ".7z", ".lz4", ".tgz"):
        return "unpack it, or pack it with gzip and name it .gz"
    return None
