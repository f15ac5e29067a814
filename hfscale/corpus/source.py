"""Raw text as a stream of documents, always in the same order: files by path, rows by number.

A text file is a document, and so is the text of a row. One longer than ``document_mb`` becomes
several, cut at line ends (or between characters, where a line is as long), so that a whole corpus
in one file can be split, spread over processes and read in bounded memory.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from hfscale.config.corpus import TextSource
from hfscale.errors import DataError, nearest
from hfscale.shards.counts import Counts
from hfscale.shards.formats import READERS, Rows
from hfscale.shards.listing import files_below, split_glob
from hfscale.shards.raw import texts_of
from hfscale.shards.tables import hub_dataset
from hfscale.shards.text_files import BYTE_ORDERS, open_source, packing_of

ROW_FACTOR = 16  # a row may be so many times as long as a document: it is held as a whole


@dataclass
class Corpus:
    """Where documents come from. ``files`` is empty for a data set of the hub; ``total_bytes`` then
    0.
    """

    source: TextSource
    root: Path
    files: list[Path]
    total_bytes: int
    digest: str  # of the files' names and sizes
    # chosen, but links that lead nowhere, or pipes
    missing: list[str] = field(default_factory=list)
    _at: str = ""

    def documents(self, counts: Counts | None = None) -> Iterator[str]:
        """Yield the text of each document; what cannot be one is counted in ``counts``.

        Raises:
            DataError: if a file cannot be read or parsed, or has no such field; naming file and
                line.
        """
        counts = Counts() if counts is None else counts
        for name in self.missing:
            counts.documents += 1
            counts.leave_out("missing", name)
        if self.source.format == "text":
            for file in self.files:
                yield from self._text(file, counts)
        else:
            for where, text in self._rows():
                yield from self._cut(where, text)

    def at(self) -> str:
        """Return the place of the document that was yielded last: a file and bytes of it, or a
        row.
        """
        return self._at

    def part(self, number: int, count: int) -> Corpus:
        """Return part ``number`` (from 0) of ``count``: consecutive files, about equal in bytes.
        Each file is in one; some may be empty.

        Raises:
            DataError: for a data set of the hub, which is one stream.
        """
        if self.source.format == "hub":
            raise DataError(
                "a data set of the hub cannot be built in parts",
                where="source.format",
                remedy="build it without --part, or save it as parquet files first",
            )
        before, chosen = 0, list[Path]()
        for file in self.files:
            if min(before * count // max(1, self.total_bytes), count - 1) == number:
                chosen.append(file)
            before += file.stat().st_size
        return replace(
            self,
            files=chosen,
            total_bytes=sum(file.stat().st_size for file in chosen),
            missing=self.missing if number == 0 else [],
        )

    def describe(self) -> dict[str, object]:
        """Return what identifies this source, without the machine's paths: the same files elsewhere
        are the same source.
        """
        chosen = self.source.model_dump(mode="json", exclude={"path"}, exclude_defaults=True)
        if self.source.format == "hub":
            return {"format": "hub", **chosen, "name": self.source.path}
        return {
            "format": self.source.format,
            **chosen,
            "files": len(self.files),
            "bytes": self.total_bytes,
            "listing": self.digest,
        }

    @property
    def _limit(self) -> int:
        return max(4, round(self.source.document_mb * 1e6))

    def _text(self, file: Path, counts: Counts) -> Iterator[str]:
        name, size = file.relative_to(self.root).as_posix(), 0
        with open_source(file) as stream:
            if packing := packing_of(stream):
                counts.documents += 1
                counts.leave_out("packed", f"{name} ({packing})")
                return
            for start, piece in pieces_of(stream, self._limit):
                size = start + len(piece)
                whole = start == 0 and len(piece) < self._limit
                self._at = name if whole else f"{name}, bytes {start:,} to {size:,}"
                try:
                    yield piece.decode("utf-8" if start else "utf-8-sig")
                except UnicodeDecodeError:
                    counts.documents += 1
                    utf_16 = not start and piece[:2] in BYTE_ORDERS
                    counts.leave_out("undecodable", self._at + " (UTF-16)" * utf_16)
            if not size:
                self._at = name
                yield ""

    def _rows(self) -> Iterator[tuple[str, str]]:
        """Yield the place and the text of each row."""
        name, most = self.source.field, ROW_FACTOR * self._limit
        if self.source.format == "webdataset":
            for file in self.files:
                for member, _, text in texts_of(file, name, most=most):
                    yield f"{file}, member {member.name}", text
            return
        if self.source.format == "hub":
            hub = hub_dataset(
                self.source.path,
                subset=self.source.subset,
                split=self.source.hub_split,
                streaming=True,
                setting="source.path",
            )
            rows: Rows = ((f"{self.source.path}, row {n}", row) for n, row in enumerate(hub))
        else:
            reader, column = READERS[self.source.format], name.split(".")[0]
            rows = (row for file in self.files for row in reader(file, column, most))
        for where, row in rows:
            yield where, _text_of(row, name, where)

    def _cut(self, where: str, text: str) -> Iterator[str]:
        """Yield the documents that the text of a row is: one, or several of a text as long as a
        long file.
        """
        self._at = where
        if 4 * len(text) <= self._limit:  # whatever its characters are
            yield text
            return
        data = io.BytesIO(text.encode("utf-8", "surrogatepass"))
        for start, piece in pieces_of(data, self._limit):
            self._at = f"{where}, from byte {start:,} of the text" if start else where
            yield piece.decode("utf-8", "surrogatepass")


def open_corpus(source: TextSource) -> Corpus:
    """Return the corpus of ``source``, its files listed and sorted, nothing read yet.

    Raises:
        DataError: if there is no such path, or no file in it that matches.
    """
    if source.format == "hub":
        return Corpus(source, Path(), [], 0, "")
    root, files, missing = _list_files(source)
    sizes = [(file.relative_to(root).as_posix(), file.stat().st_size) for file in files]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return Corpus(source, root, files, sum(size for _, size in sizes), digest, missing)


def _list_files(source: TextSource) -> tuple[Path, list[Path], list[str]]:
    """Return a folder, the chosen files below it, and the names of what was chosen and is no file.
    A glob is the pattern of the folder before its first wild card.
    """
    root, patterns = Path(source.path), source.pattern.split(",")
    if root.is_file():
        return root.parent, [root], []
    if not root.is_dir():
        if (parts := split_glob(root)) is None or not parts[0].is_dir():
            raise DataError(
                "there is no such file or folder",
                where="source.path",
                value=str((parts[0] if parts else root).absolute()),
                remedy="name a file, a folder or a glob: source.path=FOLDER",
            )
        root, patterns = parts[0], [parts[1]]
    try:
        names, others = files_below(root, patterns)
    except ValueError as error:
        raise DataError(
            f"not a pattern: {error}",
            where="source.pattern",
            value=patterns,
            remedy="globs relative to source.path, such as **/*.txt",
        ) from None
    excluded = [pattern.strip() for pattern in source.exclude.split(",")]

    def kept(names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded)
        ]

    files = [root / name for name in kept(names)]
    if not files:
        raise DataError(
            "no file matches",
            where="source.path",
            value=source.path,
            remedy=f"in a folder, pattern {source.pattern!r} and exclude {source.exclude!r} "
            "choose; hidden files never count",
        )
    return root, files, kept(others)


# ------------------------------------------------------------------------------ documents of a size
def pieces_of(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield (its first byte's place, piece) of all that is in ``stream``, in pieces of about
    ``limit`` bytes of UTF-8.

    A piece ends with the first line that ends ``limit`` bytes or more behind its beginning. Where
    that line is longer than ``limit`` bytes itself, it is cut after ``limit`` bytes of the piece,
    between characters: so twice the limit is held at most.
    """
    held, start = b"", 0
    while held := held + stream.read(2 * limit - len(held)):
        end = held.find(b"\n", limit) + 1
        if not end:
            end = len(held) if len(held) < 2 * limit else _between_characters(held, limit)
        yield start, held[:end]
        held, start = held[end:], start + end


def _between_characters(data: bytes, place: int) -> int:
    """Return the nearest place up to ``place`` at which a character of UTF-8 begins; ``place``
    where none does.
    """
    for near in range(place, max(0, place - 4), -1):
        if data[near] & 0xC0 != 0x80:
            return near
    return place


# -------------------------------------------------------------------------------- the text of a row
def _text_of(row: object, name: str, where: str) -> str:
    """Return the text in ``row`` under a dotted name; "" for null."""
    value = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            names = [str(key) for key in value] if isinstance(value, dict) else []
            remedy = (
                f"set source.field; {nearest(part, names)}"
                if names
                else "each row must be an object with named fields"
            )
            raise DataError(f"there is no field {name!r}", where=where, remedy=remedy)
        value = value[part]
    if value is not None and not isinstance(value, str):
        raise DataError(f"field {name!r} is not text", where=where, value=value)
    return value or ""
