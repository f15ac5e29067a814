"""Files that are either whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from hfscale.errors import DataError

BLOCK = 1 << 24  # bytes read at once


LEASE_S, WATCH_S = (
    1.0,
    5.0,
)  # how often a lease is renewed; for how long one must rest to be nobody's
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[IO[bytes]]:
    """Hold the file ``path``, made if need be, against other processes. The kernel lets go when this one ends, however it ends.

    Where the file system has no locks, a file beside it is a lease: renewed once a second, and nobody's once it is not.

    Raises:
        BlockingIOError: if another process holds it, and this one does not ``wait``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if flock(file, wait=wait):
            yield file
        else:
            with _leased(path.with_name(f"{path.name}.lease"), wait=wait):
                yield file


def flock(file: IO[Any], *, wait: bool) -> bool:
    """Return True once ``file`` is locked; False where its file system has no locks.

    Raises:
        BlockingIOError: if another process holds it, and this one does not ``wait``.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


@contextmanager
def _leased(path: Path, *, wait: bool) -> Iterator[None]:
    seen, since = 0, time.monotonic()
    while not _made(path):
        renewed = _renewed(path)
        if renewed != seen:
            if seen and not wait:
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", str(path))
            seen, since = renewed, time.monotonic()
        elif time.monotonic() - since > WATCH_S:
            old = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
            with suppress(FileNotFoundError):  # another one was faster
                path.rename(old)
                if _renewed(old) != seen:  # and that one's new lease is what was taken away
                    old.rename(path)
                old.unlink(missing_ok=True)
        time.sleep(0.1)
    over = threading.Event()

    def renew() -> None:
        while not over.wait(LEASE_S):
            with suppress(OSError):
                os.utime(path)

    threading.Thread(target=renew, name="lease", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        path.unlink(missing_ok=True)


def _made(path: Path) -> bool:
    """Return whether this process made ``path``, which was not there."""
    try:
        open(path, "x").close()
    except FileExistsError:
        return False
    return True


def _renewed(path: Path) -> int:
    try:
        with open(path, "rb") as file:  # opened: NFS asks the server then
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
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
