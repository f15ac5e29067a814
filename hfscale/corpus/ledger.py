"""The append-only ledger of a build: first line what is built, then one line a shard that is on disk.

A build that was killed continues from it. It also keeps two builds out of one folder, at once or after each other.
"""
from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hfscale.corpus.split import Side
from hfscale.errors import DataError
from hfscale.shards.files import cannot_write, sync
from hfscale.shards.manifest import ShardEntry

FILE_NAME = "ledger.jsonl"


@dataclass(frozen=True)
class Mark:
    """Where a side's stream of documents stands when a shard is whole: the resume point."""

    documents: int = 0  # whole documents before it
    offset: int = 0  # tokens of the next document before it
    digest: str = ""  # of those documents' digests, and the next one's if it is cut: is the source still the same?


class Ledger:
    """The open ledger of ``folder``, locked until ``close``. ``shards`` and ``marks`` are what earlier attempts committed.

    Raises:
        DataError: if another build is under way there, or was made with another ``plan`` (the message says what differs).
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.path = folder / FILE_NAME
        self.shards: dict[Side, list[ShardEntry]] = {"train": [], "validation": []}
        self.marks: dict[Side, Mark] = {"train": Mark(), "validation": Mark()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # held open: it carries the lock
        except OSError as error:
            raise cannot_write(self.path, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            remedy = "wait for it, or set shards.path to another folder"
            raise DataError("another build is writing here", where=folder, remedy=remedy) from None
        try:
            self._read(json.loads(json.dumps(plan)))
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise DataError(f"the ledger of a build is damaged: {error}", where=self.path,
                            remedy="set shards.path to a new folder, or remove this one if it is not needed") from None
        except BaseException:
            self.close()
            raise

    def _read(self, plan: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # the last line of a killed build; its shard is written again
            self._file.truncate(whole)
        lines = [json.loads(line) for line in content[:whole].splitlines()]
        if not lines:
            if strangers := [child.name for child in sorted(self.path.parent.iterdir()) if child != self.path]:
                raise DataError("this folder holds something that is not a build of shards", where=self.path.parent, value=strangers[:5],
                                remedy="set shards.path to a new folder")
            self._append({"plan": plan})
            return
        if differences := _differences(lines[0]["plan"], plan):
            raise DataError("shards were already built here, or begun, from something else:\n    " + "\n    ".join(differences),
                            where=self.path.parent, remedy="set shards.path to a new folder, or remove this one if it is not needed")
        for line in lines[1:]:
            self.shards[line["side"]].append(ShardEntry(**line["shard"]))
            self.marks[line["side"]] = Mark(**line["mark"])

    def commit(self, side: Side, shard: ShardEntry, mark: Mark) -> None:
        """Return once it is on disk that ``shard`` is."""
        self.shards[side].append(shard)
        self._append({"side": side, "shard": asdict(shard), "mark": asdict(mark)})

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            sync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Return with the folder free for another build; a ledger without a line is taken away again."""
        empty = os.fstat(self._file.fileno()).st_size == 0
        if empty:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: there {before!r}, now {after!r}")
    return found
