"""Shards of a URL on this machine: fetched once a node, verified, kept in a cache of limited size.
Readers see a plain local folder:

    FOLDER/shards/NAME-<digest of the URL>/<digest of the manifest>/
        manifest.json
        x-000000.tar
        x-000000.idx
        x-000000.tar.part   what has come so far
        x-000000.lock       a hole as long as the room that is taken

Processes and jobs share a cache. Who needs a shard locks it: the first one fetches it, the others
wait and find it there. The kernel frees the lock of a killed process, and the next one goes on with
the part. Nobody waits for room while holding a lock.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hfscale.errors import PASSWORD, ConfigError, DataError
from hfscale.log import logger
from hfscale.shards.files import file_digest, flock, locked, publish, sync, write_atomically
from hfscale.shards.index import ShardIndex
from hfscale.shards.manifest import FILE_NAME, Manifest, ShardEntry

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK = 2**23  # bytes asked for at once
LEAST_BLOCK = 2**18  # after failures, so that a slow line has a block within the timeout
BACK_OFF_S, LONGEST_S, POLL_S = 0.5, 30.0, 0.2
SHARD_NAME = re.compile(r"\w[\w.\-]*\.tar", re.ASCII)
PIPE = "pipe:"  # begins a command that prints the files
INDEX_SHARE = 0.05  # of a shard, at most: 40 bytes for each member, which takes at least 1024


class Remote:
    """The folder at a URL, or behind a command (``pipe:COMMAND {}``), and its copy in the cache, of
    ``size_gb`` in all, parts included.
    """

    def __init__(
        self,
        url: str,
        *,
        folder: Path | None = None,
        size_gb: float = 100.0,
        retries: int = 6,
        timeout_s: float = 60.0,
        allow_pipe: bool = False,
    ) -> None:
        # set, it ends whatever is being fetched in CancelledError
        self.limit = int(size_gb * 1e9)
        self.cancelled = threading.Event()
        self._retries, self._timeout_s, self._block = retries, timeout_s, BLOCK
        base, _, last = url.rstrip("/").rpartition("/")
        self._base, self._manifest = (
            (base, last) if last.endswith(".json") else (f"{base}/{last}", FILE_NAME)
        )
        self._fs: AbstractFileSystem | None = None
        if PASSWORD.search(url):
            raise ConfigError(
                "a password stands in a URL: it would go into the logs",
                where="shards",
                remedy="put it into ~/.netrc (machine HOST login NAME password WORD) and take "
                "it out of the URL",
            )
        if url.startswith(PIPE):
            self._base, self._manifest = url[len(PIPE) :], FILE_NAME
            if not allow_pipe:
                raise ConfigError(
                    "this source runs a command, which needs permission",
                    where="shards",
                    value=self._base,
                    remedy="if you trust it, say data.allow_pipe=true on the command line: no "
                    "file can permit what it brings",
                )
        else:
            from fsspec.core import url_to_fs  # slow to import

            # bytes as they are; proxies
            web = {
                "headers": {"Accept-Encoding": "identity"},
                "client_kwargs": {"trust_env": True},
            }
            try:
                self._fs = url_to_fs(url, **web if url.startswith("http") else {})[0]
            except (ImportError, ValueError) as error:
                raise ConfigError(
                    f"this kind of URL cannot be opened: {error}",
                    where="shards",
                    value=url,
                    remedy="pip install 'hfscale[s3]'"
                    if url.startswith("s3:")
                    else "install what it names",
                ) from None
        self._cache = (
            folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hfscale"
        ) / "shards"
        name = self._base.rpartition("/")[2] if self._fs else "pipe"
        self._home = self._cache / f"{name}-{hashlib.sha256(self._base.encode()).hexdigest()[:12]}"

    def manifest(self) -> Manifest:
        """Return the manifest as it is on the server now, or the newest one in the cache where it
        cannot be had.

        Raises:
            ConfigError: if the cache cannot be written, or is too small for one of the shards.
            DataError: if there is no manifest, or it names files outside of its folder.
        """
        held = sorted(self._home.glob(f"*/{FILE_NAME}"), key=lambda file: file.stat().st_mtime)
        try:
            data = self._get(self._manifest, retries=1 if held else self._retries)
        except DataError as error:
            if not held:
                raise
            data = held[-1].read_bytes()
            logger.warning(
                f"{error.what} ({error.where}): going on with the manifest in the cache, {held[-1]}"
            )
        path = self._home / hashlib.sha256(data).hexdigest()[:16] / FILE_NAME
        try:
            with locked(path.with_name("lock")):
                write_atomically(path, data)
        except (OSError, DataError) as error:
            raise ConfigError(
                f"the cache cannot be written: {getattr(error, 'strerror', error)}",
                where="data.cache.folder",
                value=str(self._cache.parent),
                remedy="choose another folder",
            ) from None
        manifest = replace(Manifest.load(path), remote=self)
        for shard in manifest.shards:
            if (need := int(shard.bytes * (1 + INDEX_SHARE))) > self.limit:
                raise ConfigError(
                    "the cache is too small for one shard",
                    where="data.cache.size_gb",
                    value=self.limit / 1e9,
                    remedy=f"{shard.name} takes up to {need:,} bytes, the cache has "
                    f"{self.limit:,}; see docs/data.md",
                )
            if not SHARD_NAME.fullmatch(shard.name):  # it becomes part of a URL, or of a command
                raise DataError(
                    "a remote shard must be a .tar beside its manifest, with a name of "
                    "letters, digits and . _ -",
                    where=self._place(self._manifest),
                    value=shard.name,
                )
        return manifest

    def sample(self, entry: ShardEntry) -> int:
        """Return how many bytes of a shard came from the server in answer to one question; they are
        not kept.

        Raises:
            DataError: if none came.
        """
        return len(self._get(entry.name, at=0, end=entry.bytes, retries=1))

    @contextmanager
    def hold(self, folder: Path, entry: ShardEntry) -> Iterator[None]:
        """Keep a shard and its index in ``folder``, fetched if need be, while the context lasts; it
        counts as used now.

        Raises:
            DataError: if they cannot be had, or are not those of the manifest.
        """
        tar, index, held = folder / entry.name, folder / entry.index_name, False
        while not held:
            with locked(index.with_suffix(".lock")) as lock:
                if held := (tar.exists() and index.exists()) or self._fetch(
                    tar, index, entry, lock
                ):
                    os.utime(lock.name)
                    yield
            if not held:
                logger.info(
                    f"the cache {self._cache.parent} is full of shards that are just being "
                    "fetched: waiting for room"
                )
                self.cancelled.wait(POLL_S)

    def _fetch(self, tar: Path, index: Path, entry: ShardEntry, lock: IO[bytes]) -> bool:
        """Return True once a shard is in its place, verified; False where others that are being
        fetched take all the room.
        """
        part = tar.with_name(f"{tar.name}.part")
        wanted = f"{entry.bytes:,} bytes, SHA-256 {entry.digest}"
        fetched = ""
        # what does not match is fetched once more from the start: the part may be of another day
        for _ in range(2):
            data = self._get(entry.index_name)
            if not self._reserve(lock, entry.bytes + len(data)):
                return False
            write_atomically(index, data)
            with open(part, "ab") as file:
                at = file.tell()
                while at < entry.bytes and (data := self._get(entry.name, at=at, end=entry.bytes)):
                    # the whole file: from a command, or a server that ignores ranges
                    if len(data) > entry.bytes - at:
                        file.truncate(0)
                        at = 0
                    file.write(data)
                    file.flush()  # what a killed process has written need not come again
                    at += len(data)
                sync(file.fileno())
            fetched = f"{at:,} bytes, SHA-256 {file_digest(part)}"
            if fetched == wanted and ShardIndex.load(index).tar_digest == entry.digest:
                publish(part, tar)
                return True
            part.unlink()
        raise DataError(
            "the file on the server is not the one of the manifest",
            where=self._place(entry.name),
            value=f"{fetched}; expected {wanted}",
            remedy="put back the shard and index that the manifest describes",
        )

    def _place(self, name: str) -> str:
        return f"{self._base}/{name}" if self._fs else self._base.replace("{}", shlex.quote(name))

    def _get(
        self, name: str, *, at: int = 0, end: int | None = None, retries: int = 2**31
    ) -> bytes:
        """Return a whole file; with ``end`` a block from ``at`` on: empty where the file ends
        before, whole from what knows no blocks.
        """
        place, attempt = self._place(name), 0
        while not self.cancelled.wait(
            attempt
            and min(LONGEST_S, BACK_OFF_S * 2 ** min(attempt, 9)) * random.uniform(0.25, 0.5)
        ):
            try:
                if self._fs is None:
                    return subprocess.run(
                        place, shell=True, stdout=subprocess.PIPE, check=True
                    ).stdout
                span = {} if end is None else {"start": at, "end": min(end, at + self._block)}
                # the others have no way to say it
                timeout = {"timeout": self._timeout_s} if self._fs.async_impl else {}
                data: bytes = self._fs.cat_file(place, **span, **timeout)
                self._block = min(BLOCK, self._block + LEAST_BLOCK)
                return data
            except Exception as error:  # every kind of file system has its own
                if at and "range" in str(error).lower():  # http and s3: it cannot be satisfied
                    return b""
                status, attempt = getattr(error, "status", None) or 0, attempt + 1
                final = isinstance(error, FileNotFoundError | PermissionError) or (
                    status // 100 == 4 and status not in (408, 425, 429)
                )
                reason = f"attempt {attempt}: {type(error).__name__}: {error}"
                if final or attempt > min(retries, self._retries):
                    raise DataError(
                        f"cannot fetch, {reason}",
                        where=place,
                        remedy="check address, server and your rights",
                    ) from error
                logger.warning(f"{place}: {reason}; trying again")
                self._block = max(LEAST_BLOCK, self._block // 2)
        raise CancelledError

    def _reserve(self, mine: IO[bytes], need: int) -> bool:
        """Return whether there is room, now noted as the length of the lock; what was not used for
        the longest time goes for it.
        """
        with locked(self._cache / "lock"):
            others = [path for path in self._cache.glob("*/*/*.lock") if path != Path(mine.name)]
            room = self.limit - sum(path.stat().st_size for path in others)
            for path in sorted(others, key=lambda path: path.stat().st_mtime_ns):
                # of one that is being fetched or opened
                with (
                    open(path, "r+b") as lock,
                    suppress(BlockingIOError),
                ):
                    if room < need and (taken := lock.seek(0, os.SEEK_END)):
                        if not flock(lock, wait=False):
                            break  # without locks nobody knows what is in use
                        for suffix in (".tar", ".tar.part", ".idx"):
                            path.with_suffix(suffix).unlink(missing_ok=True)
                        lock.truncate(0)
                        room += taken
            mine.truncate(need if room >= need else 0)
        return room >= need
