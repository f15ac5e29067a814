"""Raw text as a stream of documents, always in the same order: files by path, rows by number.

A text file is a document. One longer than ``document_mb`` becomes several, cut at line ends, so that a whole corpus in
one file can be split, spread over processes and read in bounded memory.
"""
from __future__ import annotations

import csv
import fnmatch
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any

from hfscale.config.schema import TextSource
from hfscale.errors import DataError, nearest
from hfscale.shards.tars import walk

EXAMPLES = 3  # of skipped files that a report names


@dataclass
class Corpus:
    """Where documents come from. ``files`` is empty for a data set of the hub; ``total_bytes`` then 0."""

    source: TextSource
    root: Path
    files: list[Path]
    total_bytes: int
    digest: str  # of the files' names and sizes
    undecodable: int = 0  # files, or pieces of long files, that are not UTF-8
    examples: list[str] = field(default_factory=list)

    def documents(self) -> Iterator[str]:
        """Yield the text of each document.

        Raises:
            DataError: if a file cannot be read or parsed, or has no such field; naming file and line.
        """
        self.undecodable, self.examples = 0, []
        if self.source.format == "hub":
            yield from _hub(self.source)
        elif self.source.format == "text":
            for file in self.files:
                yield from self._text(file)
        else:
            for file in self.files:
                yield from READERS[self.source.format](file, self.source.field)

    def describe(self) -> dict[str, Any]:
        """Return what identifies this source, without the machine's paths: the same files elsewhere are the same source."""
        chosen = self.source.model_dump(mode="json", exclude={"path"}, exclude_defaults=True)
        if self.source.format == "hub":
            return {"format": "hub", **chosen, "name": self.source.path}
        return {"format": self.source.format, **chosen, "files": len(self.files), "bytes": self.total_bytes, "listing": self.digest}

    def _text(self, file: Path) -> Iterator[str]:
        limit = max(1, round(self.source.document_mb * 1e6))
        with _open(file) as stream:
            while piece := stream.read(limit):
                if len(piece) == limit:
                    piece += stream.readline()
                try:
                    yield piece.decode("utf-8-sig")
                except UnicodeDecodeError:
                    self.undecodable += 1
                    self.examples = [*self.examples, str(file.relative_to(self.root))][:EXAMPLES]


def open_corpus(source: TextSource) -> Corpus:
    """Return the corpus of ``source``, its files listed and sorted, nothing read yet.

    Raises:
        DataError: if there is no such path, or no file in it that matches.
    """
    if source.format == "hub":
        return Corpus(source, Path(), [], 0, "")
    root, files = _list_files(source)
    sizes = [(file.relative_to(root).as_posix(), file.stat().st_size) for file in files]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return Corpus(source, root, files, sum(size for _, size in sizes), digest)


def _list_files(source: TextSource) -> tuple[Path, list[Path]]:
    path = Path(source.path)
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        root = path
        patterns = [pattern.strip() for pattern in source.pattern.split(",")]
        try:
            found = {file for pattern in patterns for file in root.glob(pattern)}
        except (NotImplementedError, ValueError) as error:
            raise DataError(f"not a pattern: {error}", where="source.pattern", value=source.pattern,
                            remedy="globs relative to source.path, such as **/*.txt") from None
    elif has_magic(source.path):
        parts = path.parts
        fixed = next(i for i, part in enumerate(parts) if has_magic(part))
        root = Path(*parts[:fixed])
        found = {Path(name) for name in glob(source.path, recursive=True)}
    else:
        raise DataError("there is no such file or folder", where="source.path", value=str(path.absolute()),
                        remedy="name a file, a folder or a glob: source.path=FOLDER")
    excluded = [pattern.strip() for pattern in source.exclude.split(",") if pattern.strip()]

    def wanted(file: Path) -> bool:
        name = file.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        return not hidden and not any(fnmatch.fnmatchcase(name.as_posix(), pattern) for pattern in excluded) and file.is_file()

    files = sorted(filter(wanted, found), key=lambda file: file.relative_to(root).as_posix())
    if not files:
        raise DataError("no file matches", where="source.path", value=source.path,
                        remedy=f"in a folder, pattern {source.pattern!r} and exclude {source.exclude!r} choose; hidden files never count")
    return root, files


@contextmanager
def _open(file: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            yield stream  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read a source file: {getattr(error, 'strerror', None) or error}", where=file) from None


def _jsonl(file: Path, name: str) -> Iterator[str]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"not a JSON line: {error}", where=where, remedy="one JSON object a line, in UTF-8") from None
            yield _text_of(row, name, where)


def _csv(file: Path, name: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    with _open(file) as stream:
        lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(stream))
        rows = csv.DictReader(lines)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (UnicodeDecodeError, csv.Error) as error:
                raise DataError(f"not a readable csv row: {error}", where=f"{file}:{rows.line_num + 1}",
                                remedy="a header line, commas, UTF-8") from None
            yield _text_of(row, name, f"{file}:{rows.line_num}")


def _parquet(file: Path, name: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            column = name.split(".")[0]
            if column not in table.schema_arrow.names:
                raise _no_field(name, table.schema_arrow.names, str(file))
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for row in batch.to_pylist():
                    yield _text_of(row, name, f"{file}, row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable parquet file: {error}", where=file) from None


def _webdataset(file: Path, name: str) -> Iterator[str]:
    from webdataset import WebDataset

    for _ in walk(file):  # webdataset would lose the rest of a damaged tar silently
        pass
    extension, _, inner = name.partition(".")
    for sample in WebDataset(str(file), shardshuffle=False, empty_check=False):
        where = f"{file}, sample {sample['__key__']}"
        fields = {key: value for key, value in sample.items() if not key.startswith("__")}
        if extension not in fields:
            raise _no_field(extension, fields, where)
        payload = fields[extension]
        if extension != "json":
            try:
                yield payload.decode("utf-8-sig")
            except UnicodeDecodeError:
                raise DataError(f"member .{extension} is not UTF-8", where=where) from None
        else:
            try:
                row = json.loads(payload)
            except ValueError as error:
                raise DataError(f"member .json is not JSON: {error}", where=where) from None
            yield _text_of(row, inner or "text", where)


def _hub(source: TextSource) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.path, source.subset, split=source.hub_split, streaming=True)
    except Exception as error:  # datasets has no common class for what users get wrong
        first_line = str(error).strip().split("\n")[0]
        raise DataError(f"cannot open the data set: {first_line}", where="source.path", value=source.path,
                        remedy="check the name, source.subset and source.hub_split, and the network") from error
    for number, row in enumerate(rows):
        yield _text_of(row, source.field, f"{source.path}, row {number}")


def _text_of(row: Any, name: str, where: str) -> str:
    """Return the text in ``row`` under a dotted name; "" for null."""
    value = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise _no_field(name, value if isinstance(value, dict) else (), where)
        value = value[part]
    if value is not None and not isinstance(value, str):
        raise DataError(f"field {name!r} is not text", where=where, value=value)
    return value or ""


def _no_field(name: str, known: Any, where: str) -> DataError:
    names = [str(key) for key in known]
    remedy = f"set source.field; {nearest(name, names)}" if names else "each row must be an object with named fields"
    return DataError(f"there is no field {name!r}", where=where, remedy=remedy)


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet, "webdataset": _webdataset}
