"""Which files lie below a folder and match globs: the same list on every Python, links followed.

``Path.glob`` follows links to folders from 3.13 on alone, and ``glob`` runs around in circles of
them. Hidden files and folders never count; a link back to a folder that it lies in leads no
further.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from hfscale.errors import DataError

Parts = tuple[str, ...]


def split_glob(path: Path) -> tuple[Path, str] | None:
    """Return the folder before the first wild card of ``path`` and the pattern from there on; None
    where there is none.
    """
    first = next((number for number, part in enumerate(path.parts) if has_magic(part)), None)
    return None if first is None else (Path(*path.parts[:first]), "/".join(path.parts[first:]))


def files_below(root: Path, patterns: Sequence[str] = ("**",)) -> tuple[list[str], list[str]]:
    """Return the names, relative to ``root``, of the files that match one of the globs, and of what
    matches and is no file (a link that leads nowhere, a pipe); both sorted.

    Raises:
        ValueError: for what is no glob below a folder.
        DataError: for a folder that cannot be read.
    """
    wanted = [_parts(pattern) for pattern in patterns]
    files, others = list[str](), list[str]()
    for parts, is_file in _walk(root, (), wanted, frozenset()):
        if any(_matches(parts, pattern) for pattern in wanted):
            (files if is_file else others).append("/".join(parts))
    return sorted(files), sorted(others)


def _walk(
    folder: Path, place: Parts, wanted: Sequence[Parts], above: frozenset[tuple[int, int]]
) -> Iterator[tuple[Parts, bool]]:
    """Yield what is below ``folder`` and no folder itself, and whether it is a file; only where one
    of ``wanted`` leads.
    """
    try:
        here = os.stat(folder)
        if (identity := (here.st_dev, here.st_ino)) in above:
            return
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"cannot read a folder: {error.strerror}",
            where=folder,
            remedy="make it readable, or choose files that lie elsewhere",
        ) from None
    for name in names:
        path, parts = folder / name, (*place, name)
        if path.is_dir():
            if any(_leads(parts, pattern) for pattern in wanted):
                yield from _walk(path, parts, wanted, above | {identity})
        else:
            yield parts, _is_file(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a link to itself
        return False


def _parts(pattern: str) -> Parts:
    parts = tuple(part for part in pattern.strip().split("/") if part != ".")
    if not parts or "" in parts or ".." in parts:
        raise ValueError(f"{pattern!r} is no glob below a folder")
    if any("**" in part and part != "**" for part in parts):
        raise ValueError(f"{pattern!r}: '**' can only be an entire path component")
    return parts


def _matches(parts: Parts, pattern: Parts) -> bool:
    """Return whether a file matches; ``**`` stands for any folders, and at the end for anything
    below them.
    """
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[k:], pattern[1:]) for k in range(len(parts), -1, -1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _leads(parts: Parts, pattern: Parts) -> bool:
    """Return whether something below the folder ``parts`` can match."""
    if not parts or not pattern:
        return bool(pattern)
    if pattern[0] == "**":
        return True
    return fnmatchcase(parts[0], pattern[0]) and _leads(parts[1:], pattern[1:])
