"""Index and manifest for raw-text WebDataset tars that others made. The tars themselves are only read."""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from hfscale.errors import DataError, nearest
from hfscale.shards.index import MEMBER, ShardIndex
from hfscale.shards.manifest import FILE_NAME, TEXT, Manifest, ShardEntry
from hfscale.shards.tars import Member, walk
from hfscale.shards.verify import file_digest

EXTENSIONS = ("txt", "json", "text")  # where the text is looked for, in this order


def index_tars(tars: Sequence[Path], *, folder: Path, extension: str | None, threads: int,
               checked: Callable[[ShardEntry], None] = lambda entry: None) -> Manifest:
    """Return the manifest written into ``folder`` with one ``.idx`` a tar: a member a sample, the one that holds its text.

    Samples are what webdataset makes of the tar: consecutive members of one key, the name up to the first dot.

    Raises:
        DataError: for a damaged tar, a sample without text, or where another index or manifest is in the way.
    """
    if not tars:
        raise DataError("no tars to index", remedy="give files such as data/*.tar")
    stems = [tar.stem for tar in tars]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise DataError("two tars of one name would share an index", value=f"{twice}.idx",
                        remedy="index them into different folders (--out)")
    folder.mkdir(parents=True, exist_ok=True)

    def one(tar: Path) -> tuple[ShardEntry, ShardIndex]:
        index = _index(tar, extension)
        entry = ShardEntry(name=os.path.relpath(tar, folder), bytes=tar.stat().st_size, tokens=0, documents=len(index.members),
                           digest=index.tar_digest, max_id=-1)
        checked(entry)
        return entry, index

    with ThreadPoolExecutor(threads) as pool:
        made = list(pool.map(one, sorted(tars)))
    source = {"format": "webdataset", "extension": extension or "first of " + ", ".join(EXTENSIONS)}
    manifest = Manifest(dtype=TEXT, tokenizer=None, source=source, shards=tuple(entry for entry, _ in made), folder=folder)
    _refuse_other(manifest)
    for entry, index in made:
        index.save(folder / entry.index_name)
    manifest.save(folder)
    return manifest


def _index(tar: Path, extension: str | None) -> ShardIndex:
    from webdataset.tariterators import base_plus_ext

    rows: list[tuple[int, int, int, int, int]] = []
    with open(tar, "rb") as file:
        def close(key: str, members: dict[str, Member]) -> None:
            member = next((members[name] for name in ([extension] if extension else EXTENSIONS) if name in members), None)
            if member is None:
                raise DataError("a sample has no text", where=f"{tar}, sample {key}", value=sorted(members),
                                remedy=f"name the extension that holds it (--field): {nearest(extension or 'txt', members)}")
            file.seek(member.offset)
            payload = file.read(member.size)
            try:
                payload.decode()
            except UnicodeDecodeError:
                raise DataError("the text of a sample is not UTF-8", where=f"{tar}, member {member.name}") from None
            rows.append((member.offset, member.size, 0, 1, xxhash.xxh3_64_intdigest(payload)))

        current, members = "", dict[str, Member]()
        for member in walk(tar):
            key, name = base_plus_ext(member.name)
            if key is None or Path(member.name).name.startswith("."):
                continue  # webdataset passes over these too
            if key != current and members:
                close(current, members)
                members = {}
            if name.lower() in members:
                raise DataError("a sample has two members of one name", where=f"{tar}, member {member.name}")
            current, members[name.lower()] = key, member
        if members:
            close(current, members)
    if not rows:
        raise DataError("a tar without samples", where=tar)
    return ShardIndex(file_digest(tar), np.array(rows, MEMBER))


def _refuse_other(manifest: Manifest) -> None:
    folder = manifest.folder
    if (folder / FILE_NAME).exists():
        if Manifest.load(folder) != manifest:
            raise DataError("there is another manifest here", where=folder / FILE_NAME, remedy="index into another folder (--out)")
        return
    for entry in manifest.shards:
        path = folder / entry.index_name
        if path.exists() and ShardIndex.load(path).tar_digest != entry.digest:
            raise DataError("there is another index here", where=path, remedy="index into another folder (--out)")
