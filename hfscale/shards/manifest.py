"""``manifest.json``: which shards belong together, and what is in them. Its digest names the data.

A corpus of token shards is a folder with ``manifest.json``, ``NAME-%06d.tar`` and
``NAME-%06d.idx``. The same class describes raw-text tars that others made: ``dtype`` is then "text"
and there is no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import Field

from hfscale.errors import DataError
from hfscale.records import STRICT, Count, Damaged, Record, parse, read_file
from hfscale.shards.counts import Seen
from hfscale.shards.files import write_atomically

VERSION = 1
FILE_NAME = "manifest.json"
TEXT = "text"  # the dtype of raw-text shards
DTYPES = ("uint16", "uint32", TEXT)
REMEDY = "restore it, or build the shards again"
FileName = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids. ``vocab_size`` is one more than the largest id it can give."""

    __pydantic_config__ = STRICT

    digest: str
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    eod_id: Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file beside the manifest, and what is in it. ``digest`` is the SHA-256 of the
    tar.
    """

    __pydantic_config__ = STRICT

    name: FileName
    bytes: Count
    tokens: Count
    documents: Count  # that end in this shard
    digest: str
    max_id: Annotated[int, Field(ge=-1, lt=2**32)]

    @property
    def index_name(self) -> str:
        """The name of the index, always beside the manifest."""
        return Path(self.name).with_suffix(".idx").name


class Fetcher(Protocol):
    """Where shards come from that are not here for good: who opens one holds it meanwhile."""

    limit: int  # bytes that it keeps here at once
    cancelled: threading.Event  # set, it ends whatever is on its way in CancelledError

    def hold(self, folder: Path, entry: ShardEntry) -> AbstractContextManager[None]:
        """Return a context that keeps a shard and its index in ``folder``."""

    def sample(self, entry: ShardEntry) -> int:
        """Return how many bytes of a shard came in answer to one question."""


class _Version(Record):
    """What every version of the file says."""

    version: int


class _Source(Record):
    """Where the text came from."""

    field: str | None = None
    seen: Seen | None = None


class _File(Record):
    """The file of this version."""

    version: Literal[1]
    dtype: str
    tokenizer: TokenizerInfo | None
    source: _Source
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards, in order. ``source`` says where the text came from, in
    words and counts.
    """

    dtype: str
    tokenizer: TokenizerInfo | None
    source: Mapping[str, object]
    shards: tuple[ShardEntry, ...]
    version: int = VERSION
    # where it was loaded from; not part of the data
    folder: Path = field(default=Path("."), compare=False)
    # what ``folder`` is a copy of, in the making
    remote: Fetcher | None = field(default=None, compare=False)

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Return the manifest at ``path``: the file itself, or the folder that holds it.

        Raises:
            DataError: if it is missing, not a manifest, or of a version that this program does not
                know.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            data = read_file(path)
            version = parse(_Version, data).version
            if version != VERSION:
                raise DataError(
                    "a manifest of an unknown version",
                    where=path,
                    value=version,
                    remedy=f"this program reads version {VERSION}",
                )
            file = parse(_File, data)
        except FileNotFoundError:
            raise DataError(
                "there is no manifest of shards", where=path, remedy=_remedy_missing(path)
            ) from None
        except OSError as error:
            raise DataError(f"the manifest cannot be read: {error.strerror}", where=path) from None
        except Damaged as error:
            raise DataError(
                f"the manifest is damaged: {error}", where=path, remedy=REMEDY
            ) from None
        manifest = cls(
            dtype=file.dtype,
            tokenizer=file.tokenizer,
            source=file.source.as_dict(),
            shards=file.shards,
            folder=path.parent,
        )
        if manifest.dtype not in DTYPES:
            raise DataError(
                "a manifest with an unknown dtype",
                where=path,
                value=manifest.dtype,
                remedy=f"known: {', '.join(DTYPES)}",
            )
        if problem := _contradiction(manifest):
            raise DataError(f"the manifest is damaged: {problem}", where=path, remedy=REMEDY)
        return manifest

    def save(self, folder: str | Path) -> Path:
        """Return the path of the ``manifest.json`` written into ``folder``, whole or not at all."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path,
            (
                json.dumps(self._content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
            ).encode(),
        )
        return path

    def local(self, entry: ShardEntry) -> AbstractContextManager[None]:
        """Return a context that keeps a shard and its index in ``folder``: to be entered before
        they are opened.
        """
        return self.remote.hold(self.folder, entry) if self.remote else nullcontext()

    @property
    def _content(self) -> dict[str, object]:
        tokenizer = asdict(self.tokenizer) if self.tokenizer else None
        shards = [dict(vars(entry)) for entry in self.shards]
        return {
            "version": self.version,
            "dtype": self.dtype,
            "tokenizer": tokenizer,
            "source": dict(self.source),
            "shards": shards,
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the manifest's canonical JSON: equal exactly when the data is equal."""
        canonical = json.dumps(
            self._content, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    def changes(self, other: Manifest) -> str:
        """Return in words what ``other`` has that this one has not, or differently."""
        old, new = ({shard.name: shard for shard in manifest.shards} for manifest in (self, other))
        shards = {
            "added": new.keys() - old,
            "removed": old.keys() - new,
            "changed": {n for n in old if new.get(n, old[n]) != old[n]},
        }
        differences = [
            f"shards {how}: {len(names):,}, the first {min(names)}"
            for how, names in shards.items()
            if names
        ]
        differences += [
            f"another {name}"
            for name in ("dtype", "tokenizer", "source")
            if getattr(self, name) != getattr(other, name)
        ]
        return "; ".join(differences or ["the order of the shards"])

    @property
    def seen(self) -> Seen | None:
        """What the build read and left out; None: it does not say."""
        return _Source.model_validate(dict(self.source)).seen

    @property
    def text_field(self) -> str:
        """The member of a sample that is its text, where rows are of raw text."""
        field = _Source.model_validate(dict(self.source)).field
        assert field is not None, "a manifest of raw text without it is refused"
        return field

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The little-endian dtype of the token ids on disk."""
        dtype: np.dtype[np.generic] = np.dtype(self.dtype).newbyteorder("<")
        return dtype

    @property
    def tokens(self) -> int:
        """Tokens in all shards, end-of-document ids included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards on disk, without the indexes."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def max_id(self) -> int:
        """The largest token id in any shard; -1 where there are none."""
        return max((shard.max_id for shard in self.shards), default=-1)


def _contradiction(manifest: Manifest) -> str | None:
    """Return what two parts of a manifest say against each other."""
    tokenizer, raw = manifest.tokenizer, manifest.dtype == TEXT
    if (tokenizer is None) != raw:
        return "token shards name their tokenizer, raw text has none"
    if raw and not isinstance(manifest.source.get("field"), str):
        return "raw text names the field that holds it (source.field)"
    if tokenizer and tokenizer.eod_id >= tokenizer.vocab_size:
        return f"tokenizer.eod_id: {tokenizer.eod_id} is no id of {tokenizer.vocab_size}"
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) < len(names):
        return f"shards: {next(name for name in names if names.count(name) > 1)!r} is there twice"
    return None


def _remedy_missing(path: Path) -> str:
    folder = path.parent
    parts = (
        sorted(child.name for child in folder.iterdir() if (child / FILE_NAME).is_file())
        if folder.is_dir()
        else []
    )
    if parts:
        return (
            f"this folder holds {' and '.join(parts)}: name one of them, e.g. {folder / parts[-1]}"
        )
    return (
        "make shards with `hfscale shards build CONFIG`, or finish an interrupted build by "
        "running it again"
    )
