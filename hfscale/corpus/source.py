"""Raw text as a stream of documents, always in the same order: files by path, rows by number.

A text file is a document. One longer than ``document_mb`` becomes several, cut at line ends, so that a whole corpus in
one file can be split, spread over processes and read in bounded memory.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import Any

from hfscale.config.schema import TextSource
from hfscale.errors import DataError, nearest
from hfscale.shards.raw import texts_of
from hfscale.shards.tables import READERS, hub_dataset, open_source

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
        name = self.source.field
        if self.source.format == "text":
            for file in self.files:
                yield from self._text(file)
        elif self.source.format == "webdataset":
            yield from (text for file in self.files for _, _, text in texts_of(file, name))
        elif self.source.format == "hub":
            hub = hub_dataset(
                self.source.path,
                subset=self.source.subset,
                split=self.source.hub_split,
                streaming=True,
                setting="source.path",
            )
            yield from (
                _text_of(row, name, f"{self.source.path}, row {number}")
                for number, row in enumerate(hub)
            )
        else:
            rows = READERS[self.source.format]
            yield from (
                _text_of(row, name, where)
                for file in self.files
                for where, row in rows(file, name.split(".")[0])
            )

    def part(self, number: int, count: int) -> Corpus:
        """Return part ``number`` (from 0) of ``count``: consecutive files, about equal in bytes. Each file is in one; some may be empty.

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
        return replace(self, files=chosen, total_bytes=sum(file.stat().st_size for file in chosen))

    def describe(self) -> dict[str, Any]:
        """Return what identifies this source, without the machine's paths: the same files elsewhere are the same source."""
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

    def _text(self, file: Path) -> Iterator[str]:
        limit = max(1, round(self.source.document_mb * 1e6))
        with open_source(file) as stream:
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
    """Return a folder and the chosen files below it. A glob is the pattern of the folder before its first wild card."""
    root, patterns = Path(source.path), source.pattern.split(",")
    if root.is_file():
        return root.parent, [root]
    if not root.is_dir():
        fixed = next((number for number, part in enumerate(root.parts) if has_magic(part)), None)
        if fixed is None:
            raise DataError(
                "there is no such file or folder",
                where="source.path",
                value=str(root.absolute()),
                remedy="name a file, a folder or a glob: source.path=FOLDER",
            )
        root, patterns = Path(*root.parts[:fixed]), [str(Path(*root.parts[fixed:]))]
    try:
        found = {
            file.relative_to(root) for pattern in patterns for file in root.glob(pattern.strip())
        }
    except (NotImplementedError, ValueError) as error:
        raise DataError(
            f"not a pattern: {error}",
            where="source.pattern",
            value=patterns,
            remedy="globs relative to source.path, such as **/*.txt",
        ) from None
    excluded = [pattern.strip() for pattern in source.exclude.split(",")]
    names = sorted(
        name.as_posix()
        for name in found
        if not any(part.startswith(".") for part in name.parts) and (root / name).is_file()
    )
    files = [
        root / name
        for name in names
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded)
    ]
    if not files:
        raise DataError(
            "no file matches",
            where="source.path",
            value=source.path,
            remedy=f"in a folder, pattern {source.pattern!r} and exclude {source.exclude!r} choose; hidden files never count",
        )
    return root, files


# ------------------------------------------------------------------------------------------- the text of a row
def _text_of(row: Any, name: str, where: str) -> str:
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
