"""Raw-text WebDataset tars that others made: their index and manifest, and the text of their
samples. The tars are only read.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from hfscale.errors import DataError, nearest
from hfscale.records import open_file
from hfscale.shards.files import file_digest
from hfscale.shards.index import MEMBER, ShardIndex
from hfscale.shards.manifest import FILE_NAME, TEXT, Manifest, ShardEntry
from hfscale.shards.tars import PICKLED, Member, walk

FIELDS = ("txt", "json.text", "text")  # where the text is looked for, in this order


def index_tars(
    tars: Sequence[Path],
    *,
    folder: Path,
    field: str | None,
    threads: int,
    checked: Callable[[ShardEntry], None] = lambda entry: None,
) -> Manifest:
    """Return the manifest written into ``folder`` with one ``.idx`` a tar: a member a sample, the
    one that holds its text.

    Samples are what webdataset makes of the tar: consecutive members of one key, the name up to the
    first dot. ``field`` is the rest of the name of the member with the text, and after ``json`` the
    place of the text in it (``json.text``); None: one of FIELDS, whichever the first sample has. It
    is part of the manifest.

    Raises:
        DataError: for a damaged tar, a sample without text, or where another index or manifest is
            in the way.
    """
    if not tars:
        raise DataError("no tars to index", remedy="give files such as data/*.tar")
    tars = sorted(tars)
    _refuse_one_name(tars)
    if field is None:
        _, first = next(members_of(tars[0]), ("", {}))
        field = next((known for known in FIELDS if _split(known)[0] in first), FIELDS[0])
    folder.mkdir(parents=True, exist_ok=True)

    def one(tar: Path) -> tuple[ShardEntry, ShardIndex]:
        index = _index(tar, field)
        entry = ShardEntry(
            name=os.path.relpath(tar, folder),
            bytes=tar.stat().st_size,
            tokens=0,
            documents=len(index.members),
            digest=index.tar_digest,
            max_id=-1,
        )
        checked(entry)
        return entry, index

    with ThreadPoolExecutor(threads) as pool:
        entries = list(pool.map(one, tars))
    source = {"format": "webdataset", "field": field}
    manifest = Manifest(
        dtype=TEXT,
        tokenizer=None,
        source=source,
        shards=tuple(entry for entry, _ in entries),
        folder=folder,
    )
    _refuse_other(manifest)
    for entry, index in entries:
        index.save(folder / entry.index_name)
    manifest.save(folder)
    return manifest


def _refuse_one_name(tars: Sequence[Path]) -> None:
    stems = Counter(tar.stem for tar in tars)
    for stem, count in stems.items():
        if count > 1:
            raise DataError(
                "two tars of one name would share an index",
                value=f"{stem}.idx",
                remedy="index them into different folders (--out)",
            )


def text_of(payload: bytes, field: str) -> str:
    """Return the text in a member's payload.

    Raises:
        ValueError: if it is not UTF-8, or its JSON has no such text; the message goes on from "the
            text of a sample".
    """
    _, place = _split(field)
    try:
        text = payload.decode("utf-8-sig")
        value: object = json.loads(text) if place else text
        for part in place:
            if not isinstance(value, dict) or part not in value:
                raise ValueError(
                    f"is not under {field!r}: "
                    f"{nearest(part, value) if isinstance(value, dict) else 'not an object'}"
                )
            value = value[part]
        if not isinstance(value, str):
            raise ValueError(f"is no string: {value!r:.60}")
        value.encode()
    except UnicodeError:
        raise ValueError("is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not in JSON: {error}") from None
    return value


@lru_cache(64)  # reading an index again takes a fraction of a millisecond
def samples_of(folder: Path, entry: ShardEntry) -> np.ndarray:
    """Return the index of a tar of raw text: a MEMBER a sample.

    Raises:
        DataError: if it is missing or damaged, or not that of the manifest's entry.
    """
    path = folder / entry.index_name
    index = ShardIndex.load(path)
    if index.tar_digest != entry.digest or len(index.members) != entry.documents:
        what = (
            "belongs to another shard than the manifest names"
            if index.tar_digest != entry.digest
            else f"counts {len(index.members):,} samples, the manifest {entry.documents:,}"
        )
        raise DataError(
            f"the index {what}",
            where=path,
            remedy="restore it, or make index and manifest again: `hfscale shards index`",
        )
    return index.members


def read_text(
    file: IO[bytes], offset: int, size: int, checksum: int, *, field: str, verify: bool = True
) -> str:
    """Return the text of a sample out of its tar.

    Raises:
        ValueError: if it is damaged or has no such text; the message goes on from "the text of a
            sample".
    """
    file.seek(offset)
    payload = file.read(size)
    if len(payload) < size or (verify and xxhash.xxh3_64_intdigest(payload) != checksum):
        raise ValueError("is cut off" if len(payload) < size else "does not match its checksum")
    return text_of(payload, field)


Sample = tuple[Path, int, int, int]  # tar; offset, size and checksum of the member with the text
# of samples: ids end to end, where each ends, what is wrong with some
Encoded = tuple[np.ndarray, np.ndarray, dict[int, str]]


def encode_samples(
    encode: Callable[[list[str]], list[np.ndarray]],
    samples: Sequence[Sample],
    field: str,
    verify: bool,
    filler: np.ndarray,
) -> Encoded:
    """Return the samples' ids, with ``filler`` in place of a damaged one. Runs in processes of its
    own.
    """
    texts, damage = list[str](), dict[int, str]()
    for number, (path, offset, size, checksum) in enumerate(samples):
        try:
            with open_file(path) as file:
                texts.append(read_text(file, offset, size, checksum, field=field, verify=verify))
        except (OSError, ValueError) as error:
            damage[number] = (
                f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            )
    whole = iter(encode(texts))
    ids = [filler if number in damage else next(whole) for number in range(len(samples))]
    return np.concatenate(ids), np.cumsum([len(part) for part in ids]), damage


def _split(field: str) -> tuple[str, list[str]]:
    """Return the extension of the member that ``field`` names, and the keys that lead to the text
    in its JSON (none: it is the text).
    """
    extension, dot, place = field.partition("json")
    if dot and (not extension or extension.endswith(".")) and (not place or place.startswith(".")):
        return extension + "json", (place[1:] or "text").split(".")
    return field, []


def members_of(tar: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield the key of each sample, and its members by the rest of their names."""
    from webdataset.tariterators import base_plus_ext

    current, members = "", dict[str, Member]()
    for member in walk(tar):
        key, name = base_plus_ext(member.name)
        if (
            key is None
            or Path(member.name).name.startswith(".")
            or re.match(r"__[^/]*__($|/)", member.name)
        ):
            continue  # webdataset passes over these too
        if key != current and members:
            yield current, members
            members = {}
        if name.lower() in members:
            raise DataError(
                "a sample has two members of one name", where=f"{tar}, member {member.name}"
            )
        current, members[name.lower()] = key, member
    if members:
        yield current, members


def texts_of(
    tar: Path, field: str, *, most: int | None = None
) -> Iterator[tuple[Member, bytes, str]]:
    """Yield of each sample the member that ``field`` names, its payload and the text in it.

    Raises:
        DataError: for a damaged tar, a sample without text, and a member of more than ``most``
            bytes.
    """
    extension, _ = _split(field)
    with open_file(tar) as file:
        for key, members in members_of(tar):
            if (member := members.get(extension)) is None or extension in PICKLED:
                known = nearest(extension, members.keys() - PICKLED)
                raise DataError(
                    f"a sample has no text: there is no field {extension!r}",
                    where=f"{tar}, sample {key}",
                    value=sorted(members),
                    remedy="name the extension that holds it, never a pickle (--field, "
                    f"source.field): {known}",
                )
            if most is not None and member.size > most:
                raise too_large(f"{tar}, member {member.name}", member.size, most)
            file.seek(member.offset)
            payload = file.read(member.size)
            try:
                yield member, payload, text_of(payload, field)
            except ValueError as error:
                raise DataError(
                    f"the text of a sample {error}",
                    where=f"{tar}, member {member.name}",
                    remedy="say where the text is, e.g. --field txt or --field json.text, or "
                    "leave this tar out",
                ) from None


def too_large(where: object, size: int, most: int) -> DataError:
    """Return the error for a row that would have to be held as a whole and is larger than that
    allows.
    """
    return DataError(
        f"a row is larger than {most / 1e6:,.0f} MB, which is as much as is held of one",
        where=where,
        value=f"{size:,} bytes" if size > most else "more",
        remedy="cut it into several rows, make it a text file of its own, or raise "
        "source.document_mb",
    )


def _index(tar: Path, field: str) -> ShardIndex:
    rows = [
        (member.offset, member.size, 0, 1, xxhash.xxh3_64_intdigest(payload))
        for member, payload, _ in texts_of(tar, field)
    ]
    if not rows:
        raise DataError("a tar without samples", where=tar)
    return ShardIndex(file_digest(tar), np.array(rows, MEMBER))


def _refuse_other(manifest: Manifest) -> None:
    folder = manifest.folder
    if (folder / FILE_NAME).exists():
        if Manifest.load(folder) != manifest:
            raise DataError(
                "there is another manifest here",
                where=folder / FILE_NAME,
                remedy="index into another folder (--out)",
            )
        return
    for entry in manifest.shards:
        path = folder / entry.index_name
        if path.exists() and ShardIndex.load(path).tar_digest != entry.digest:
            raise DataError(
                "there is another index here",
                where=path,
                remedy="index into another folder (--out)",
            )
