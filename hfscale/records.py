"""The one door for files that are read: regular files of a bounded size, and JSON of a bounded
depth and a known shape.

Whatever lies on a disk may be damaged, a stranger's, or no file at all (a pipe, /dev/zero). What a
record holds is said once, in the types of a dataclass or a `Record`; what does not fit them is
refused with its file, its key and its value.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Hashable
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Annotated, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hfscale.errors import DataError, UserError

# more than a manifest of a million shards or a tokenizer of 500,000 tokens has
FILE_BYTES = 1 << 28
NODES = 20_000_000  # lists, objects and their members in one file; each takes some 100 bytes
LONGEST_NAME = 255  # bytes, of what lies in a folder: Linux's own limit
# of a dataclass that is a record: as __pydantic_config__
STRICT = ConfigDict(strict=True, extra="forbid")

Count = Annotated[int, Field(ge=0, lt=2**53)]  # of anything; sums of thousands of them fit an int64
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
T = TypeVar("T")


class Record(BaseModel):
    """What we wrote and read again: its types are strict; keys that later versions add are let
    through.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())

    def as_dict(self) -> dict[str, object]:
        """Return what was written, and nothing that was not."""
        return self.model_dump(exclude_unset=True)


# -------------------------------------------------------------------------------------------- files
def open_file(path: Path | str) -> IO[bytes]:
    """Return the regular file ``path``, opened to be read, without waiting for whoever writes into
    a pipe.

    Raises:
        OSError: if it cannot be opened or is anything else, such as a pipe or a device.
        UserError: if this process has no more files to open; that says nothing about the file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # NUL, or what is no text of the file system
        raise OSError(errno.EINVAL, f"no name of a file: {error}", ascii(str(path))) from None
    except OSError as error:
        refuse_full_table(error, path)
        raise
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        os.close(handle)
        code, what = (
            (errno.EISDIR, os.strerror(errno.EISDIR))
            if stat.S_ISDIR(kind)
            else (errno.EINVAL, "it is no regular file, but a pipe, a socket or a device")
        )
        raise OSError(code, what, str(path))
    return os.fdopen(handle, "rb")


def refuse_full_table(error: OSError, path: Path | str) -> None:
    """Raise a UserError where ``error`` says that too many files are open: it is no fault of the
    file ``path``.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise UserError(
            "this process may not open any more files",
            where=path,
            value=error.strerror,
            remedy="raise the limit (ulimit -n 4096), then run the same command again",
        ) from None


def read_file(path: Path | str, *, most: int = FILE_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: as ``open_file``; and for a file of more than ``most`` bytes, EFBIG.
    """
    with open_file(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most / 1e6:,.0f} MB", str(path))
    return data


def is_name(path: Path | str) -> bool:
    """Return whether ``path`` can be one at all: the calls of the system refuse NUL, lone
    surrogates and parts that are too long.
    """
    try:
        parts = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:
        return False
    return b"\0" not in b"".join(parts) and max(map(len, parts)) <= LONGEST_NAME


# --------------------------------------------------------------------------------------------- JSON
class Damaged(ValueError):
    """JSON that is none, or not of its shape; the message names the key and shows the value."""


def parse(kind: type[T], data: bytes | str) -> T:
    """Return the JSON ``data`` as a ``kind``: a dataclass, a `Record`, or an annotation such as
    ``list[dict[str, object]]``.

    Raises:
        Damaged: if it is not JSON (of at most 200 levels), or of other types and ranges.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if sum(map(raw.count, (b"[", b"{", b","))) > NODES:
        raise Damaged(f"it has more than {NODES:,} parts")
    try:
        return cast(T, _adapter(cast(Hashable, kind)).validate_json(raw, strict=True))
    except ValidationError as error:
        raise Damaged(_first(error)) from None


def load(
    path: Path,
    kind: type[T],
    *,
    what: str,
    remedy: str = "",
    error: type[UserError] = DataError,
    most: int = FILE_BYTES,
) -> T:
    """Return the JSON file ``path`` as a ``kind``, as ``parse`` does; ``what`` it is called in
    errors: "the manifest".

    Raises:
        UserError: of the class ``error``, if it cannot be read or is not of that kind.
    """
    try:
        return parse(kind, read_file(path, most=most))
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise error(f"{what} cannot be read: {reason}", where=path, remedy=remedy) from None
    except Damaged as problem:
        raise error(f"{what} is damaged: {problem}", where=path, remedy=remedy) from None


@lru_cache
def _adapter(kind: Hashable) -> TypeAdapter[object]:
    own = is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, BaseModel))
    return TypeAdapter(cast(type[object], kind), config=None if own else ConfigDict(strict=True))


def _first(error: ValidationError) -> str:
    """Return the first thing that is wrong, on one short line."""
    item = error.errors(include_url=False, include_context=False)[0]
    message = item["msg"][0].lower() + item["msg"][1:]
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "json_invalid":
        return f"not JSON: {message.removeprefix('invalid JSON: ')}"
    shown = "" if item["type"] == "missing" else f", not {item['input']!r:.80}"
    return f"{key + ': ' if key else ''}{message}{shown}"
