"""Files that are either whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hfscale.errors import DataError
from hfscale.records import open_file

BLOCK = 1 << 24  # bytes read at once


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Hold the file ``path``, made if need be, against other processes. The kernel lets go when this one ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Return once ``path`` holds ``data`` on disk; a crash leaves the old file or the new one, never a part.

    Raises:
        DataError: if there is no room for it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    publish(temporary, path)


def publish(temporary: Path, final: Path) -> None:
    """Return once the (already synced) ``temporary`` is known as ``final``, also after a power cut."""
    os.replace(temporary, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Return once the names in ``folder`` are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def sync(descriptor: int) -> None:
    """Return once the file behind ``descriptor`` is on disk."""
    os.fsync(descriptor)


def cannot_write(path: Path, error: OSError) -> DataError:
    """Return the error to raise when ``path`` could not be written: the cause, and the room that is left."""
    try:
        status = os.statvfs(path.parent)
        room = f"{status.f_bavail * status.f_frsize / 1e9:.2f} GB free there"
    except OSError:
        room = "the folder cannot be read"
    return DataError(
        f"cannot write: {error.strerror or error}",
        where=path,
        remedy=f"{room}; make room or choose another folder, then run the same command again: it continues",
    )
