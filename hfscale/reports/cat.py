"""What stands in shards, to be read by a person: documents and rows by position, samples of raw
text by position or key.

Documents and rows are counted from 0 over all shards of a manifest, in its order. A document counts
where it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hfscale import run_files
from hfscale.errors import DataError
from hfscale.records import open_file
from hfscale.shards.manifest import Manifest
from hfscale.shards.raw import read_text, samples_of
from hfscale.shards.reader import ShardReader
from hfscale.shards.tars import walk
from hfscale.stream.rows import TokenRows
from hfscale.tokenizer import FILE_NAME, load_tokenizer, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def find_tokenizer(manifest: Manifest, path: str | None) -> PreTrainedTokenizerFast:
    """Return the tokenizer that made the ids: the one at ``path``, or else one in or beside the
    folders of the shards.

    Raises:
        DataError: if there is none, or ``path`` is another one.
    """
    assert manifest.tokenizer is not None
    folder = manifest.folder.absolute()
    places = [folder, *folder.parents[:2]]
    beside = [
        str(folder)
        for place in places
        for folder in (place / run_files.TOKENIZER, place)
        if (folder / FILE_NAME).is_file()
    ]
    for candidate in beside if path is None else [path]:
        if tokenizer_digest(candidate) == manifest.tokenizer.digest:
            return load_tokenizer(candidate)
    if path is not None:
        raise DataError(
            "these shards were made with another tokenizer",
            where=manifest.folder,
            value=path,
            remedy=f"give the one with digest {manifest.tokenizer.digest[:16]}",
        )
    raise DataError(
        "the tokenizer of these shards is not beside them",
        where=manifest.folder,
        value=beside,
        remedy=f"say where it is: --tokenizer FOLDER (digest {manifest.tokenizer.digest[:16]})",
    )


def documents(manifest: Manifest, *, first: int, count: int) -> Iterator[tuple[str, list[int]]]:
    """Yield a title and the ids of documents ``first``, ``first + 1``, ..., each with its
    end-of-document id.
    """
    wanted = _range("document", first, count, manifest.documents)
    number = 0  # of the document that the next shard goes on with, or begins with
    # of a document: where it begins, and its ids in this and earlier shards
    place = ""
    begin = 0
    parts = list[np.ndarray]()
    for entry in manifest.shards:
        if wanted.start <= number + entry.documents and number < wanted.stop:
            with manifest.local(entry):
                reader = ShardReader(manifest.folder, entry, dtype=manifest.numpy_dtype)
            edges = [0, *reader.ends().tolist(), len(reader)]
            for k in range(
                max(0, wanted.start - number), min(len(edges) - 1, wanted.stop - number)
            ):
                start, stop = edges[k : k + 2]
                if start == stop:
                    continue  # the last document ends with the shard
                if not parts:
                    place, begin = f"{entry.name}  {reader.locate(start)[0]}", start
                parts.append(np.empty(stop - start, np.int64))
                reader.read_tokens(start, stop, parts[-1])
                if k < entry.documents:
                    ids = np.concatenate(parts).tolist()
                    yield (
                        f"document {number + k:,}  {place}  {len(ids):,} tokens from {begin:,}",
                        ids,
                    )
                    parts = []
        number += entry.documents


def rows(
    manifest: Manifest, *, first: int, count: int, seq_len: int
) -> Iterator[tuple[str, list[int]]]:
    """Yield a title and the ids (``seq_len`` of each, as they enter a model) of rows ``first``,
    ``first + 1``, ...
    """
    stream = TokenRows(manifest, seq_len=seq_len)
    before = np.cumsum([0, *stream.shard_rows])
    ids = np.empty((1, seq_len + 1), np.int64)
    for number in _range("row", first, count, int(before[-1])):
        shard = int(np.searchsorted(before, number, side="right")) - 1
        row = number - int(before[shard])
        stream.fill(np.array([shard]), np.array([row]), ids)
        yield (
            f"row {number:,}  {manifest.shards[shard].name}  {seq_len:,} tokens from "
            f"{row * seq_len:,}",
            ids[0, :-1].tolist(),
        )


def samples(
    manifest: Manifest, *, first: int, count: int, key: str | None
) -> Iterator[tuple[str, str]]:
    """Yield a title and the text of samples ``first``, ``first + 1``, ... of tars of raw text, or
    of the first ``count`` with this key.
    """
    from webdataset.tariterators import base_plus_ext  # slow to import

    wanted = (
        _range("sample", first, count, manifest.documents)
        if key is None
        else range(manifest.documents)
    )
    shown = stop = 0
    for entry in manifest.shards:
        numbers = range(stop, stop := stop + entry.documents)
        if numbers.stop <= wanted.start or numbers.start >= wanted.stop or shown == count:
            continue
        path = manifest.folder / entry.name
        with manifest.local(entry):
            members = samples_of(manifest.folder, entry)
        names = {member.offset: member.name for member in walk(path)}
        with open_file(path) as file:
            for number, member in zip(numbers, members, strict=True):
                name = names.get(int(member["offset"]), "(not in the tar)")
                if number in wanted and shown < count and key in (None, base_plus_ext(name)[0]):
                    shown += 1
                    try:
                        text = read_text(
                            file,
                            *(int(member[of]) for of in ("offset", "bytes", "checksum")),
                            field=manifest.text_field,
                        )
                    except ValueError as error:
                        raise DataError(
                            f"sample {number:,} (member {name}): the text {error}", where=path
                        ) from None
                    yield f"sample {number:,}  {entry.name}  {name}", text
    if key is not None and not shown:
        raise DataError(
            "no sample has this key",
            where=manifest.folder,
            value=key,
            remedy="a key is a member's name up to its first dot",
        )


def _range(what: str, first: int, count: int, there: int) -> range:
    """Return the numbers asked for, as far as they are there."""
    if not 0 <= first < there:
        raise DataError(
            f"there is no such {what}",
            where=f"--{what if what == 'row' else 'document'}",
            value=first,
            remedy=f"they are numbered 0 to {there - 1:,}" if there else "these shards are empty",
        )
    return range(first, min(first + count, there))
