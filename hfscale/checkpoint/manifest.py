"""What a checkpoint consists of: every file with its size and SHA-256. Written last; without it
there is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hfscale.checkpoint import layout
from hfscale.errors import CheckpointError
from hfscale.records import STRICT, Count, Record, Sha256, parse, read_file
from hfscale.shards.files import file_digest

VERSION = 1
# bytes: more than any file has that says what a checkpoint is (config, state), less than weights
# worth the name
SMALL = 2**20
SMALL_FILES = (layout.STATE, layout.CONFIG, layout.GENERATION, layout.PROBE)  # that are read
ALWAYS = (layout.STATE, layout.rank_file(0))  # in every checkpoint


# stays in the checkpoint, whatever system reads it
FilePath = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[\w\-.]+(/[\w\-.]+)*$")]


@dataclass(frozen=True)
class Entry:
    """A file, by its path in the checkpoint."""

    __pydantic_config__ = STRICT

    path: FilePath
    bytes: Count
    sha256: Sha256


class _File(Record):
    version: Annotated[int, Field(ge=1)]
    step: Count
    files: list[Entry]
    sha256: Sha256


def write_file(folder: Path, path: str, chunks: Iterable[memoryview | bytes]) -> Entry:
    """Return the entry of a file just written and synced; it is hashed on the way, never read
    again.
    """
    digest, size = hashlib.sha256(), 0
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb", buffering=0) as file:
        for chunk in chunks:
            rest = memoryview(chunk).cast("B")
            digest.update(rest)
            size += len(rest)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return Entry(path, size, digest.hexdigest())


def write_manifest(folder: Path, entries: Iterable[Entry], *, step: int) -> None:
    """Make ``folder`` a checkpoint. It carries a digest of itself, so an edited manifest is found
    too.
    """
    body = {
        "version": VERSION,
        "step": step,
        "files": [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.path)],
    }
    text = json.dumps({**body, "sha256": _digest(body)}, indent=1)
    write_file(folder, layout.MANIFEST, [text.encode()])


def read_manifest(checkpoint: Path) -> list[Entry]:
    """Return the entries of a checkpoint's manifest.

    Raises:
        CheckpointError: if a newer hfscale wrote it. The checkpoint may well be good.
        ValueError: if it is missing, damaged or edited; says how.
    """
    try:
        read = parse(_File, read_file(checkpoint / layout.MANIFEST))
    except FileNotFoundError:
        raise ValueError(
            f"{layout.MANIFEST} is missing: the checkpoint was never committed, or copied in part"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{layout.MANIFEST} is not readable: {_reason(error)}") from None
    if outside := [entry.path for entry in read.files if ".." in entry.path.split("/")]:
        raise ValueError(f"{layout.MANIFEST} names a file outside of the checkpoint: {outside[0]}")
    if read.sha256 != _digest(read.model_dump(exclude={"sha256"})):
        raise ValueError(f"{layout.MANIFEST} was changed after it was written")
    if read.version > VERSION:
        raise CheckpointError(
            "a newer version of hfscale wrote this checkpoint",
            where=checkpoint,
            value=read.version,
            remedy=f"update hfscale: this one knows format {VERSION}",
        )
    if layout.step_name(read.step) != checkpoint.name:
        raise ValueError(f"{layout.MANIFEST} is that of step {read.step}")
    # who re-makes a manifest may leave a name out, and its file would be believed unread
    names = {entry.path for entry in read.files}
    if lacking := [name for name in ALWAYS if name not in names]:
        raise ValueError(f"{layout.MANIFEST} does not list {', '.join(lacking)}")
    return read.files


def problem_with(checkpoint: Path, entry: Entry, *, digest: bool) -> str | None:
    """Return what is wrong with one file, or None if its size, and its digest if asked for,
    match.
    """
    path = checkpoint / entry.path
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{entry.path} has {size} bytes instead of {entry.bytes}"
        good = not digest or file_digest(path) == entry.sha256
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return f"{entry.path} is missing" if missing else f"{entry.path}: {_reason(error)}"
    return None if good else f"{entry.path} does not have the digest it was written with"


def verify(
    checkpoint: Path, *, part: int = 0, parts: int = 1, up_to: float = math.inf
) -> list[str]:
    """Return everything wrong with a checkpoint; none means that it may be loaded. Files of more
    than ``up_to`` bytes are not read.

    Of its files, only each ``parts``-th from ``part`` on is looked at, so that ranks can share the
    work.
    """
    try:
        entries = read_manifest(checkpoint)
    except ValueError as error:
        return [str(error)]
    # all are read
    files = {
        f"{layout.ENGINE}/{file.name}"
        for file in (checkpoint / layout.ENGINE).glob("*.safetensors")
    }
    small = {name for name in SMALL_FILES if (checkpoint / name).is_file()}
    strangers = [
        f"{path} is not of this checkpoint"
        for path in sorted((files | small) - {entry.path for entry in entries})
    ]
    with ThreadPoolExecutor(4) as pool:
        problems = pool.map(
            lambda entry: problem_with(checkpoint, entry, digest=entry.bytes <= up_to),
            entries[part::parts],
        )
        return strangers + [problem for problem in problems if problem]


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
