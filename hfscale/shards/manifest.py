"""``manifest.json``: which shards belong together, and what is in them. Its digest names the data.

A corpus of token shards is a folder with ``manifest.json``, ``NAME-%06d.tar`` and ``NAME-%06d.idx``.
The same class describes raw-text tars that others made: ``dtype`` is then "text" and there is no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hfscale.errors import DataError
from hfscale.shards.files import write_atomically

VERSION = 1
FILE_NAME = "manifest.json"
TEXT = "text"  # the dtype of raw-text shards
DTYPES = ("uint16", "uint32", TEXT)
REMEDY = "restore it, or build the shards again"
PIPE = "pipe:"  # begins a command that prints the files


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids. ``vocab_size`` is one more than the largest id it can give."""

    digest: str
    vocab_size: int
    eod_id: int


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file beside the manifest, and what is in it. ``digest`` is the SHA-256 of the tar."""

    name: str
    bytes: int
    tokens: int
    documents: int  # that end in this shard
    digest: str
    max_id: int

    @property
    def index_name(self) -> str:
        """The name of the index, always beside the manifest."""
        return Path(self.name).with_suffix(".idx").name


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards, in order. ``source`` says where the text came from, in words and counts."""

    dtype: str
    tokenizer: TokenizerInfo | None
    source: Mapping[str, Any]
    shards: tuple[ShardEntry, ...]
    version: int = VERSION
    folder: Path = field(
        default=Path("."), compare=False
    )  # where it was loaded from; not part of the data
    remote: Any = field(
        default=None, compare=False
    )  # the Remote of which ``folder`` is a copy in the making

    @classmethod
    def load(cls, path: str | Path, **remote: Any) -> Manifest:
        """Return the manifest at ``path``: the file itself, the folder that holds it, or the URL of one; ``remote`` is for ``Remote``.

        Raises:
            DataError: if it is missing, not a manifest, or of a version that this program does not know.
        """
        if "://" in str(path) or str(path).startswith(PIPE):
            from hfscale.shards.remote import Remote

            return Remote(str(path), **remote).manifest()
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise DataError(
                "there is no manifest of shards", where=path, remedy=_remedy_missing(path)
            ) from None
        except OSError as error:
            raise DataError(f"the manifest cannot be read: {error.strerror}", where=path) from None
        except ValueError as error:
            raise DataError(
                f"the manifest is not JSON: {error}", where=path, remedy=REMEDY
            ) from None
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise DataError(
                "a manifest of an unknown version",
                where=path,
                value=version,
                remedy=f"this program reads version {VERSION}",
            )
        try:
            tokenizer = content["tokenizer"] and TokenizerInfo(**content["tokenizer"])
            shards = tuple(ShardEntry(**entry) for entry in content["shards"])
            manifest = cls(
                dtype=content["dtype"],
                tokenizer=tokenizer,
                source=content["source"],
                shards=shards,
                folder=path.parent,
            )
            numbers = [
                getattr(shard, name)
                for shard in shards
                for name in ("bytes", "tokens", "documents", "max_id")
            ]
            if not all(isinstance(number, int) for number in numbers):
                raise TypeError("counts are no numbers")
            if (tokenizer is None) != (manifest.dtype == TEXT) and manifest.dtype in DTYPES:
                raise TypeError("token shards name their tokenizer, raw text has none")
            if manifest.dtype == TEXT and not isinstance(manifest.source.get("field"), str):
                raise TypeError("raw text names the field that holds it")
        except (KeyError, TypeError) as error:
            raise DataError(
                f"the manifest is damaged: {error}", where=path, remedy=REMEDY
            ) from None
        if manifest.dtype not in DTYPES:
            raise DataError(
                "a manifest with an unknown dtype",
                where=path,
                value=manifest.dtype,
                remedy=f"known: {', '.join(DTYPES)}",
            )
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
        """Return a context that keeps a shard and its index in ``folder``: to be entered before they are opened."""
        return self.remote.hold(self.folder, entry) if self.remote else nullcontext()

    @property
    def _content(self) -> dict[str, Any]:
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
        found = [
            f"shards {how}: {len(names):,}, the first {min(names)}"
            for how, names in shards.items()
            if names
        ]
        found += [
            f"another {name}"
            for name in ("dtype", "tokenizer", "source")
            if getattr(self, name) != getattr(other, name)
        ]
        return "; ".join(found or ["the order of the shards"])

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The little-endian dtype of the token ids on disk."""
        return np.dtype(self.dtype).newbyteorder("<")

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
    return "make shards with `hfscale shards build CONFIG`, or finish an interrupted build by running it again"
