"""Shards of a URL on this machine: fetched once a node, verified, kept in a cache of limited size. Readers see a plain local folder:

    FOLDER/shards/NAME-<digest of the URL>/<digest of the manifest>/{manifest.json, x-000000.tar, x-000000.idx}
                                                                    x-000000.tar.part   what has come so far
                                                                    x-000000.lock       the room that it takes, in bytes

Processes and jobs share a cache. Who needs a shard locks it: the first one fetches it, the others wait and find it there. The kernel
frees the lock of a killed process, and the next one goes on with the part. Nobody waits for room while holding a lock.
"""
from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import IO, Any

from hfscale.errors import ConfigError, DataError
from hfscale.log import logger
from hfscale.shards.files import cannot_write, publish, sync, write_atomically
from hfscale.shards.index import ShardIndex
from hfscale.shards.manifest import FILE_NAME, PIPE, Manifest, ShardEntry
from hfscale.shards.verify import file_digest

BLOCK, LEAST_BLOCK = 2**23, 2**18  # bytes asked for at once; halved by a failure, so that a slow line has one within the timeout
BACK_OFF_S, LONGEST_S, POLL_S, PATIENCE = 0.5, 30.0, 0.2, 25  # the last: how often room is looked for before a word is said
INDEX_SHARE = 0.05  # of a shard, at most: 40 bytes for each member, which takes at least 1024


class Remote:
    """The folder at a URL, or behind a command (``pipe:COMMAND {}``), and its copy in the cache.

    ``size_gb`` is the limit of the whole cache, parts included; ``retries`` and ``timeout_s`` are for one block.

    Raises:
        ConfigError: for a command without permission, and for a URL that nothing here can open.
    """

    def __init__(self, url: str, *, folder: Path | None = None, size_gb: float = 100.0, retries: int = 6, timeout_s: float = 60.0,
                 allow_pipe: bool = False) -> None:
        self.limit, self.cancelled = int(size_gb * 1e9), threading.Event()
        self._retries, self._timeout_s, self._block = retries, timeout_s, BLOCK
        self._fs: Any = None
        if url.startswith(PIPE):
            self._base, self._query, self._manifest, name = url[len(PIPE):], "", FILE_NAME, "pipe"
            if not allow_pipe:
                raise ConfigError("this source runs a command, which needs permission", where="shards", value=self._base,
                                  remedy="set data.allow_pipe=true in the config of the run, if you trust it")
        else:
            address, sign, query = url.partition("?")
            self._query = sign + query  # a signature, say: neither logged nor part of the name
            self._base, _, last = address.rstrip("/").rpartition("/")
            self._base, self._manifest = (self._base, last) if last.endswith(".json") else (f"{self._base}/{last}", FILE_NAME)
            name, self._fs = re.sub(r"[^\w.-]", "_", self._base.rpartition("/")[2]), _file_system(url)
        home = folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hfscale"
        self._cache = home / "shards"
        self._home = self._cache / f"{name}-{hashlib.sha256(self._place(self._manifest).encode()).hexdigest()[:12]}"

    def manifest(self) -> Manifest:
        """Return the manifest as it is on the server now, or the newest one in the cache where the server cannot be reached.

        Raises:
            ConfigError: if the cache cannot be written, or is too small for one of the shards.
            DataError: if there is no manifest, or it names files outside of its folder.
        """
        held, url = sorted(self._home.glob(f"*/{FILE_NAME}"), key=lambda file: file.stat().st_mtime), self._place(self._manifest)
        try:
            data = self._get(self._manifest, retries=min(self._retries, 1) if held else self._retries)
        except DataError as error:
            if not held or _is_final(error.__cause__):
                raise
            data = held[-1].read_bytes()
            logger.warning(f"{error.what} ({url}): going on with the manifest in the cache, {held[-1]}")
        path = self._home / hashlib.sha256(data).hexdigest()[:16] / FILE_NAME
        try:
            with _locked(self._home / "lock"):
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, data)
        except (OSError, DataError) as error:
            raise ConfigError(f"the cache cannot be written: {getattr(error, 'strerror', error)}", where="data.cache.folder",
                              value=str(self._cache.parent), remedy="choose another folder") from None
        try:
            manifest = Manifest.load(path)
        except DataError as error:
            path.unlink()
            raise DataError(error.what, where=url, remedy="check the URL: this is no manifest of shards") from None
        for shard in manifest.shards:
            if (need := int(shard.bytes * (1 + INDEX_SHARE))) > self.limit:
                raise ConfigError("the cache is too small for one shard", where="data.cache.size_gb", value=self.limit / 1e9,
                                  remedy=f"{shard.name} takes up to {need:,} bytes, the cache has {self.limit:,}; see docs/data.md")
            if Path(shard.name).is_absolute() or ".." in Path(shard.name).parts:
                raise DataError("a shard lies outside of the folder of its manifest", where=url, value=shard.name,
                                remedy="put the manifest above the shards: `hfscale shards index --out FOLDER`")
        return replace(manifest, remote=self)

    @contextmanager
    def hold(self, folder: Path, entry: ShardEntry) -> Iterator[None]:
        """Keep a shard and its index in ``folder``, fetched if need be, while the context lasts; it counts as used now.

        Raises:
            DataError: if they cannot be had, or are not those of the manifest.
            CancelledError: once ``cancelled`` is set.
        """
        tar, index = folder / entry.name, folder / entry.index_name
        for turn in count():
            with _locked(index.with_suffix(".lock")) as lock:
                if (tar.exists() and index.exists()) or self._fetch(tar, index, entry, lock):
                    os.utime(tar)
                    yield
                    return
            if turn == PATIENCE:
                logger.warning(f"the cache {self._cache.parent} is full of shards that are just being fetched: waiting for room")
            self._pause(POLL_S)

    def _fetch(self, tar: Path, index: Path, entry: ShardEntry, lock: IO[bytes]) -> bool:
        """Return True once a shard is in its place, verified; False where others that are being fetched take all the room."""
        part, expected, found = tar.with_name(f"{tar.name}.part"), f"{entry.bytes:,} bytes, SHA-256 {entry.digest}", ""
        try:
            for _ in range(2):  # what does not match is fetched once more from the start: the part may be of another day
                data = self._get(entry.index_name)
                if not self._reserve(lock, entry.bytes + len(data), entry.name):
                    return False
                write_atomically(index, data)
                part.parent.mkdir(parents=True, exist_ok=True)
                with open(part, "ab") as file:
                    self._append(entry, file)
                    sync(file.fileno())
                found = f"{part.stat().st_size:,} bytes, SHA-256 {file_digest(part)}"
                if found == expected and ShardIndex.load(index).tar_digest == entry.digest:
                    publish(part, tar)
                    return True
                part.unlink()
        except OSError as error:
            raise cannot_write(tar, error) from error
        raise DataError("the file on the server is not the one of the manifest", where=self._place(entry.name),
                        value=f"{found}; expected {expected}", remedy="put back the shard and index that the manifest describes")

    def _append(self, entry: ShardEntry, file: IO[bytes]) -> None:
        """Return with the rest of a shard appended to ``file``, or as much of it as the server has."""
        at = file.seek(0, os.SEEK_END)
        while at < entry.bytes and (data := self._get(entry.name, at=at, end=entry.bytes)):
            if len(data) > entry.bytes - at:  # the whole file: from a command, or a server that ignores ranges
                file.truncate(0)
                at = 0
            file.write(data)
            file.flush()  # what a killed process has written need not come again
            at += len(data)

    def _place(self, name: str) -> str:
        return f"{self._base}/{name}" if self._fs else self._base.replace("{}", shlex.quote(name))

    def _get(self, name: str, *, at: int = 0, end: int | None = None, retries: int | None = None) -> bytes:
        """Return a whole file; with ``end`` a block from ``at`` on: empty where the file ends before, whole from what knows no blocks."""
        place = self._place(name)
        for attempt in count():
            self._pause(0)
            try:
                if self._fs is None:
                    return subprocess.run(place, shell=True, stdout=subprocess.PIPE, check=True).stdout
                span = {} if end is None else {"start": at, "end": min(end, at + self._block)}
                timeout = {"timeout": self._timeout_s} if self._fs.async_impl else {}  # the others have no way to say it
                began = time.monotonic()
                data = self._fs.cat_file(place + self._query, **span, **timeout)
                if time.monotonic() - began < self._timeout_s / 4:
                    self._block = min(BLOCK, 2 * self._block)
                return data
            except Exception as error:  # every kind of file system has its own
                status = getattr(error, "status", None)
                if at and (status == 416 or getattr(error, "errno", None) == errno.EINVAL):  # http, s3: no such range
                    return b""
                reason = f"{status} {getattr(error, 'message', '')}" if status else f"{type(error).__name__}: {error}"
                if attempt >= (self._retries if retries is None else retries) or _is_final(error):
                    raise DataError(f"cannot fetch, attempt {attempt + 1}: {reason}", where=place,
                                    remedy="check the address, the server and your rights; what has come is kept") from error
                logger.warning(f"{place}: {reason}; trying again")
                self._block = max(LEAST_BLOCK, self._block // 2)
                self._pause(min(LONGEST_S, BACK_OFF_S * 2**attempt) * random.uniform(0.5, 1))
        raise AssertionError

    def _pause(self, seconds: float) -> None:
        if self.cancelled.wait(seconds):
            raise CancelledError

    def _reserve(self, mine: IO[bytes], need: int, name: str) -> bool:
        """Return whether there is room for a shard, now noted in its lock file; what was not used for the longest time goes for it."""
        used: list[tuple[int, int, Path, Path]] = []
        with _locked(self._cache / "lock"):
            for path in self._cache.glob("*/*/*.lock"):
                size, _, other = path.read_text("utf-8").partition(" ")
                if other and path != Path(mine.name):
                    tar = path.with_name(other)
                    used.append(((tar if tar.exists() else path).stat().st_mtime_ns, int(size), path, tar))
            room = self.limit - sum(size for _, size, *_ in used)
            for _, taken, path, tar in sorted(used):
                with open(path, "r+b") as lock, suppress(BlockingIOError):  # being fetched, or opened just now
                    if room < need:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        for file in (tar, tar.with_name(f"{tar.name}.part"), path.with_suffix(".idx")):
                            file.unlink(missing_ok=True)
                        lock.truncate(0)
                        room += taken
            if room >= need:
                mine.truncate(0)
                mine.write(f"{need} {name}".encode())
                mine.flush()
        return room >= need


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _is_final(error: BaseException | None) -> bool:
    """Return whether to try again is of no use: it is not there, or not for us."""
    status = getattr(error, "status", None) or 0
    return isinstance(error, FileNotFoundError | PermissionError) or (400 <= status < 500 and status not in (408, 425, 429))


def _file_system(url: str) -> Any:
    from fsspec.core import url_to_fs  # slow to import

    web = {"headers": {"Accept-Encoding": "identity"}, "client_kwargs": {"trust_env": True}}  # bytes as they are; proxies
    try:
        return url_to_fs(url, **web if url.startswith("http") else {})[0]
    except (ImportError, ValueError) as error:
        raise ConfigError(f"this kind of URL cannot be opened: {error}", where="shards", value=url,
                          remedy="pip install 'hfscale[s3]'" if url.startswith("s3:") else "install what it names") from None
