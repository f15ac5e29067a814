"""Files that are either whole or absent: written under a temporary name, synced, renamed. And
locks, by which two writers take turns.

A temporary name is random and new, and never a link: what another user or process has put there is
neither followed nor shared.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from hfscale.errors import DataError
from hfscale.records import open_file

BLOCK = 1 << 24  # bytes read at once
STALE_S = 3600.0  # after which a temporary file that nobody has written to is one that a kill left
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_swept: set[Path] = set()


LEASE_S = 1.0  # how often a lease is renewed
WATCH_S = 5.0  # for how long one must rest to be nobody's
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[IO[bytes]]:
    """Hold the file ``path``, made if need be, against other processes. The kernel lets go when
    this one ends, however it ends.

    Where the file system has no locks, a file beside it is a lease: renewed once a second, and
    nobody's once it is not.

    Raises:
        BlockingIOError: if another process holds it, and this one does not ``wait``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as file:
        if flock(file, wait=wait):
            yield file
        else:
            with _leased(path.with_name(f"{path.name}.lease"), wait=wait):
                yield file


def flock(file: IO[bytes] | IO[str], *, wait: bool) -> bool:
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


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Be the only process that makes ``path``: another one is refused, not waited for. The lock
    lies beside it, and goes at the end.

    Raises:
        DataError: if one makes it, or it cannot be made there.
    """
    name = path.with_name(f".{path.name[:200]}.lock")
    with ExitStack() as stack:
        while True:
            try:
                file = stack.enter_context(locked(name, wait=False))
            except BlockingIOError:
                raise DataError(
                    "another process is making this at the moment",
                    where=path,
                    value=_holder(name),
                    remedy="wait for it, or name another place",
                ) from None
            except FileExistsError:  # a part of the way to it is a file
                error = OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                raise cannot_write(path, error) from None
            except OSError as error:
                raise cannot_write(path, error) from error
            if _is(file, name):
                break
            stack.close()  # who held it has just taken the file away
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        try:
            yield
        finally:
            name.unlink(missing_ok=True)


def _holder(lock: Path) -> str:
    with suppress(OSError), open_lock(lock) as file:
        return file.read(200).decode(errors="replace").strip() or "unknown"
    return "unknown"


def _is(file: IO[bytes], path: Path) -> bool:
    """Return whether ``path`` is still the name of the open ``file``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def open_lock(path: Path) -> IO[bytes]:
    """Return the file ``path``, made if need be, to read and write; a link is not followed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(path, "r+b", opener=lambda name, _: os.open(name, flags, 0o666))


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def whole(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """Give a file to write to that is ``path`` afterwards, on disk; an error or a crash leaves what
    was there before.

    ``private``: nobody but its user can read it.

    Raises:
        DataError: if there is no room for it.
    """
    _sweep(path.parent)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with _said(path, always=True):
            handle = os.open(temporary, flags, 0o600 if private else 0o666)
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                sync(file.fileno())
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it has its own name by now, or is of no use


def write_atomically(path: Path, data: bytes | memoryview, *, private: bool = False) -> None:
    """Return once ``path`` holds ``data`` on disk; a crash leaves the old file or the new one,
    never a part.

    Raises:
        DataError: if there is no room for it.
    """
    with whole(path, private=private) as file:
        file.write(data)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to fill that is ``path`` afterwards. One process at a time; what a killed
    one has left is removed first.

    Raises:
        DataError: if ``path`` exists, another process is making it, or there is no room.
    """
    with alone(path):
        for left in path.parent.iterdir():
            if re.fullmatch(re.escape(f".{path.name[:200]}.") + r"[0-9a-f]{16}\.new", left.name):
                shutil.rmtree(left)
        partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.new")
        try:
            with _said(path, always=True):
                partial.mkdir()
            with _said(path, always=False):  # it may also read
                yield partial
            if os.path.lexists(path):
                raise DataError(
                    "this folder exists already; nothing was written",
                    where=path,
                    remedy="name another folder, or remove it",
                )
            with _said(path, always=True):
                os.rename(partial, path)
                sync_folder(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # its own name by now, or of no use


@contextmanager
def _said(path: Path, *, always: bool) -> Iterator[None]:
    """Turn the system's errors inside into ones that say what could not be written; else only those
    of a full disk.
    """
    try:
        yield
    except OSError as error:
        if always or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise cannot_write(path, error) from error
        raise


def _sweep(folder: Path) -> None:
    """Remove what killed processes have left half written in ``folder``; looked for once a
    process.
    """
    if folder not in _swept:
        _swept.add(folder)
        clear_unfinished(folder, older_s=STALE_S)


def clear_unfinished(folder: Path, *, older_s: float = 0.0) -> None:
    """Remove files half written in ``folder`` that nobody has written to for so long; any, where
    the caller holds the folder.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                with suppress(OSError):  # another process was faster
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime >= older_s:
                        os.unlink(entry.path)


def publish(temporary: Path, final: Path) -> None:
    """Return once the (already synced) ``temporary`` is known as ``final``, also after a power
    cut.
    """
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
    """Return the error to raise when ``path`` could not be written: the cause, and the room that is
    left.
    """
    try:
        status = os.statvfs(path.parent)
        room = f"{status.f_bavail * status.f_frsize / 1e9:.2f} GB free there"
    except OSError:
        room = "the folder cannot be read"
    return DataError(
        f"cannot write: {error.strerror or error}",
        where=path,
        remedy=f"{room}; make room or choose another folder, then run the same command again: "
        "it continues",
    )
