"""The append-only ledger of a build: first line what is built, then one line a shard that is on
disk.

A build that was killed continues from it. It also keeps two builds out of one folder, at once or
after each other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from hfscale.config.rules import differences
from hfscale.corpus.split import Side
from hfscale.errors import DataError
from hfscale.records import STRICT, Count, Damaged, Record, parse
from hfscale.shards.counts import Seen
from hfscale.shards.files import cannot_write, clear_unfinished, locked, sync
from hfscale.shards.manifest import ShardEntry

FILE_NAME = "ledger.jsonl"


class BuildUnderWay(DataError):
    """Another process builds in the same folder."""


@dataclass(frozen=True)
class Mark:
    """Where a side's stream of documents stands when a shard is whole: the resume point."""

    __pydantic_config__ = STRICT

    documents: Count = 0  # whole documents before it
    offset: Count = 0  # tokens of the next document before it
    # of those documents' digests, and the next one's if it is cut: is the source still the same?
    digest: str = ""


class _Begun(Record):
    """The first line: what is built."""

    plan: dict[str, object] | None


class _Line(Record):
    """Another line: a shard, or what was seen in all."""

    side: Side = "train"
    shard: ShardEntry | None = None
    mark: Mark | None = None


@contextmanager
def open_ledger(
    folder: Path, plan: Mapping[str, object], *, finished: bool = False
) -> Iterator[Ledger]:
    """Yield the ledger of ``folder``, locked meanwhile; one that has no line at the end is taken
    away again.

    What is ``finished`` may be of an older encoding of text, since nothing is added to it.

    Raises:
        BuildUnderWay: if another process builds there.
        DataError: if what is there was made with another ``plan`` (the message says what differs).
    """
    path = folder / FILE_NAME
    with ExitStack() as stack:
        try:
            file = stack.enter_context(locked(path, wait=False))
        except BlockingIOError:
            raise BuildUnderWay(
                "another build is writing here",
                where=folder,
                remedy="wait for it, or set shards.path to another folder",
            ) from None
        except OSError as error:
            raise cannot_write(path, error) from None
        for place in (folder, folder / "train", folder / "validation"):
            clear_unfinished(place)  # a killed build's: nobody else writes here now
        try:
            yield Ledger(path, file, json.loads(json.dumps(plan)), finished=finished)
        finally:
            if os.fstat(file.fileno()).st_size == 0:
                path.unlink(missing_ok=True)


class Ledger:
    """What was committed to a folder: ``shards`` and ``marks``, a line each. Made by
    ``open_ledger``.
    """

    def __init__(
        self, path: Path, file: IO[bytes], plan: Mapping[str, object], *, finished: bool = False
    ) -> None:
        self._path, self._file = path, file
        self.shards: dict[Side, list[ShardEntry]] = {"train": [], "validation": []}
        self.marks: dict[Side, Mark] = {"train": Mark(), "validation": Mark()}
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        # what follows is the last line of a killed build; its shard is written again
        file.truncate(whole)
        try:
            first, *lines = content[:whole].splitlines() or [b'{"plan": null}']
            for line in (parse(_Line, line) for line in lines):
                if line.shard and line.mark:  # else what was read and left out: for people
                    self.shards[line.side].append(line.shard)
                    self.marks[line.side] = line.mark
            there = parse(_Begun, first).plan
            if there is not None and finished:
                there["encoding"] = plan.get("encoding")
        except Damaged as error:
            raise DataError(
                f"the ledger of a build is damaged: {error}",
                where=path,
                remedy="set shards.path to a new folder, or remove this one if it is not needed",
            ) from None
        if there is None:
            if strangers := [
                child.name
                for child in sorted(path.parent.iterdir())
                if not child.name.startswith(path.name)  # or its lease
            ]:
                raise DataError(
                    "this folder holds something that is not a build of shards",
                    where=path.parent,
                    value=strangers[:5],
                    remedy="set shards.path to a new folder",
                )
            self._append({"plan": plan})
        elif differing := differences(there, plan):
            changes = "".join(
                f"\n    {change.key}: there {change.old!r}, now {change.new!r}"
                for change in differing
            )
            raise DataError(
                f"shards were already built here, or begun, from something else:{changes}",
                where=path.parent,
                remedy="set shards.path to a new folder, or remove this one if it is not needed",
            )

    def commit(self, side: Side, shard: ShardEntry, mark: Mark) -> None:
        """Return once it is on disk that ``shard`` is."""
        self.shards[side].append(shard)
        self._append({"side": side, "shard": asdict(shard), "mark": asdict(mark)})

    def finish(self, seen: Seen) -> None:
        """Return once it is on disk what was read and what was left out."""
        self._append({"seen": seen.as_dict()})

    def _append(self, line: dict[str, object]) -> None:
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            sync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error) from error
