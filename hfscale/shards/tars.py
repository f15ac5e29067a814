"""A strict walk over tar headers. Stock readers lose the rest of a damaged tar without a word; this
one says where.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hfscale.errors import DataError
from hfscale.records import open_file
from hfscale.shards.files import BLOCK

# extensions that nothing here opens: a pickle runs whatever it says
PICKLED = {"pkl", "pickle", "pyd", "pt", "pth", "joblib"}
AGAIN = "fetch or restore this file again"


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name, and where its payload lies."""

    name: str
    offset: int
    size: int


def walk(path: Path) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar, in order.

    Raises:
        DataError: if the tar cannot be read, is cut short, or has a damaged header; naming the
            offset.
    """
    try:
        size = path.stat().st_size
        file = open_file(path)
    except OSError as error:
        raise DataError(f"cannot read the tar: {error.strerror}", where=path) from None
    with file:
        before = -1
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                # an empty tar stays at offset 0, from where Python 3.10 would seek to -1
                while tar.offset and (info := tar.next()) is not None:
                    if info.size < 0 or tar.offset <= before:
                        raise DataError(
                            f"member {info.name!r} at offset {info.offset:,} says that it has "
                            f"{info.size:,} bytes",
                            where=path,
                            remedy=AGAIN,
                        )
                    before = tar.offset
                    _check_stored(info, path, size=size)
                    if info.isfile():
                        yield Member(info.name, info.offset_data, info.size)
                    tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError) as error:
            raise DataError(
                f"not a readable tar: {str(error) or type(error).__name__}",
                where=path,
                remedy=f"{AGAIN}; a compressed one must be unpacked: samples are found by their "
                "place in it",
            ) from None
        _check_end(file, path, end=end, size=size)


def _check_stored(info: tarfile.TarInfo, path: Path, *, size: int) -> None:
    """Return if the bytes of a member lie in a tar of ``size`` bytes as they are."""
    if info.issparse() or info.type == tarfile.GNUTYPE_SPARSE:
        raise DataError(
            f"member {info.name!r} at offset {info.offset:,} is sparse: its bytes are not stored "
            "as they are",
            where=path,
            remedy="pack the files again without tar's -S (--sparse)",
        )
    if info.offset_data + info.size > size:
        raise DataError(
            f"the tar is cut short inside member {info.name!r} at offset {info.offset_data:,}",
            where=path,
            remedy=AGAIN,
        )


def _check_end(file: IO[bytes], path: Path, *, end: int, size: int) -> None:
    """Return if nothing but zeros, and at least a block of them, follows offset ``end``."""
    file.seek(end)
    if file.read(512).strip(b"\0") or size < end + 512:
        raise DataError(
            f"the tar ends without its closing zero block, or is damaged, at offset {end:,}",
            where=path,
            remedy=AGAIN,
        )
    while block := file.read(BLOCK):
        if block.strip(b"\0"):
            raise DataError(
                f"more follows after the end of the tar, which is at offset {end:,}: another "
                "tar, or garbage",
                where=path,
                remedy="keep each tar in a file of its own, or join them with tar --concatenate",
            )


def name_at(path: Path, offset: int) -> str:
    """Return the name of the member whose payload begins at ``offset``, or "?" where the tar does
    not tell (any more).
    """
    try:
        with open_file(path) as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "replace").name
        # whole; else it may stand in a header before this one
        if len(name) < tarfile.LENGTH_NAME and "?" not in name and name.isascii():
            return name
        return next((member.name for member in walk(path) if member.offset == offset), "?")
    except (OSError, DataError, tarfile.TarError, ValueError):
        return "?"
