"""Opening files of text that others wrote: unpacked, their encoding, their lines in bounded memory,
and what they are if no text.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from hfscale.errors import DataError
from hfscale.records import open_file
from hfscale.shards.raw import too_large

PACKINGS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"PK\x03\x04": "zip",
    b"\x1f\x8b": "gzip, but not named .gz",
    b"BZh91AY&SY": "bzip2",
}
BYTE_ORDERS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
OTHER_ENCODINGS = ("gb18030", "big5", "shift_jis")  # of which one may be named, where UTF-8 fails


@contextmanager
def open_source(file: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacked if its name ends in .gz.

    Raises:
        DataError: while opening or reading it, if that cannot be done.
    """
    try:
        with open_file(file) as plain:
            yield cast(IO[bytes], gzip.GzipFile(fileobj=plain)) if file.suffix == ".gz" else plain
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read a source file: {getattr(error, 'strerror', None) or error}", where=file
        ) from None


def packing_of(stream: IO[bytes]) -> str | None:
    """Return how a file is packed that is not read, by its first bytes."""
    head = stream.peek(16)[:16]  # type: ignore[attr-defined]
    return next((name for magic, name in PACKINGS.items() if head.startswith(magic)), None)


@contextmanager
def open_table(file: Path) -> Iterator[tuple[IO[bytes], str]]:
    """Open a table that is text; yield it and its encoding: UTF-8, or UTF-16 where its first bytes
    say so.

    Raises:
        DataError: also for what is packed, or a parquet file of another name.
    """
    with open_source(file) as stream:
        head = stream.peek(4)[:4]  # type: ignore[attr-defined]
        if packing := packing_of(stream):
            raise DataError(
                f"this file is packed ({packing}) in a way that is not read",
                where=file,
                remedy="unpack it, or pack it with gzip and name it .gz",
            )
        if head == b"PAR1":
            raise DataError(
                "this is a parquet file", where=file, remedy="give it a name that ends in .parquet"
            )
        yield stream, BYTE_ORDERS.get(head[:2], "utf-8-sig")


def lines_of(stream: IO[bytes], file: Path, *, encoding: str, most: int) -> Iterator[str]:
    """Yield the lines of a text, none longer than ``most``; lines may end in ``\\r`` alone.

    Raises:
        DataError: for a longer line, and for bytes that are not of the encoding; it names the
            encoding that they may be of.
    """
    text, number = io.TextIOWrapper(stream, encoding=encoding, newline=""), 0
    try:
        while line := text.readline(most + 1):
            number += 1
            if len(line) > most:
                raise too_large(f"{file}:{number}", len(line), most)
            yield line
    except UnicodeDecodeError as error:
        other = next((name for name in OTHER_ENCODINGS if _is_of(error.object, name)), None)
        likely = f"; it may be {other.upper()}" if other else ""
        raise DataError(
            f"not UTF-8: {error.reason}{likely}",
            where=f"{file}:{_bad_line(file) if encoding != 'utf-16' else number + 1}",
            remedy=f"convert it: iconv -f {other or 'ITS_ENCODING'} -t UTF-8 FILE > NEW",
        ) from None
    finally:
        with suppress(ValueError):
            text.detach()  # the file is closed where it was opened


def _bad_line(file: Path) -> int:
    """Return the number of the first line that is not UTF-8; what is decoded ahead does not know
    it.
    """
    decoder, number = codecs.getincrementaldecoder("utf-8")(), 1
    with open_source(file) as stream:
        while block := stream.read(1 << 20):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return number + error.object[: error.start].count(b"\n")
            number += block.count(b"\n")
    return number


def _is_of(data: bytes, encoding: str) -> bool:
    """Return whether ``data``, which may end within a character, is text of ``encoding``; Latin
    letters alone are of many.
    """
    with suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder(encoding)().decode(data)
        wide = sum("\u3040" <= character <= "\u9fff" for character in text)
        return wide > sum(not character.isascii() for character in text) / 2
    return False
