"""Everything that can be checked about shards on disk, all findings in one list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from hfscale.errors import DataError
from hfscale.shards.files import file_digest
from hfscale.shards.index import ShardIndex
from hfscale.shards.manifest import FILE_NAME, TEXT, Manifest, ShardEntry
from hfscale.shards.open import open_manifest
from hfscale.shards.raw import text_of
from hfscale.shards.reader import member_name, npy_header
from hfscale.shards.tars import walk


def manifests_at(path: str | Path) -> list[Manifest]:
    """Return the manifest at ``path``, or those of its sub-folders (``train``, ``validation``).

    Raises:
        DataError: if there is none.
    """
    folder = Path(path)
    inner = (
        sorted(folder.glob(f"*/{FILE_NAME}"))
        if folder.is_dir() and not (folder / FILE_NAME).exists()
        else []
    )
    return [Manifest.load(one) for one in inner] or [open_manifest(path)]


def verify(
    manifest: Manifest, *, threads: int, advance: Callable[[int], object] = lambda size: None
) -> list[str]:
    """Return what is wrong with the shards of ``manifest``, one line a finding; ``advance`` is told
    the bytes of each that is done.
    """

    def check(entry: ShardEntry) -> list[str]:
        with manifest.local(entry):
            findings = [
                f"{manifest.folder / entry.name}: {finding}" for finding in _check(manifest, entry)
            ]
        advance(entry.bytes)
        return findings

    with ThreadPoolExecutor(threads) as pool:  # hashing leaves the interpreter free
        return [finding for findings in pool.map(check, manifest.shards) for finding in findings]


def _check(manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    path = manifest.folder / entry.name
    if not path.is_file():
        yield "the shard is missing"
        return
    if (size := path.stat().st_size) != entry.bytes:
        yield f"has {size:,} bytes, its manifest says {entry.bytes:,}"
    if file_digest(path) != entry.digest:
        yield "its SHA-256 is not the one in the manifest"
    try:
        index = ShardIndex.load(manifest.folder / entry.index_name)
        in_tar = [(member.name, member.offset, member.size) for member in walk(path)]
    except DataError as error:
        yield error.what if error.where == str(path) else f"{error.what} ({error.where})"
        return
    if index.tar_digest != entry.digest:
        yield "the index belongs to another shard"
    if manifest.dtype != TEXT and (problem := index.problem(entry.bytes)):
        yield problem
        return
    data = np.memmap(path, np.uint8, "r")
    payloads = [
        data[offset : offset + size] for offset, size in index.members[["offset", "bytes"]].tolist()
    ]
    names = {offset: name for name, offset, _ in in_tar}
    for member, payload in zip(index.members, payloads, strict=True):
        place = (
            f"member {names.get(int(member['offset']), '(not in the tar)')} at offset "
            f"{int(member['offset']):,}"
        )
        if xxhash.xxh3_64_intdigest(payload.data) != int(member["checksum"]):
            yield f"{place} does not match its checksum"
        elif manifest.dtype == TEXT:
            try:
                text_of(payload.tobytes(), manifest.text_field)
            except ValueError as error:
                yield f"{place}: the text {error}"
    if manifest.dtype == TEXT:
        if len(index.members) != entry.documents:
            yield (
                f"the index counts {len(index.members):,} samples, the manifest {entry.documents:,}"
            )
        return
    if in_tar != [
        (
            member_name(k // 2, ("ends.npy", "tokens.bin")[k % 2]),
            int(member["offset"]),
            int(member["bytes"]),
        )
        for k, member in enumerate(index.members)
    ]:
        yield "the members of the tar are not those of the index"
    elif (index.tokens["bytes"] != index.tokens["tokens"] * manifest.numpy_dtype.itemsize).any():
        yield (
            f"the manifest says {manifest.dtype}, but the chunks have another number of "
            "bytes a token"
        )
    else:
        yield from _check_tokens(manifest, entry, index, payloads)


def _check_tokens(
    manifest: Manifest, entry: ShardEntry, index: ShardIndex, payloads: list[np.ndarray]
) -> Iterator[str]:
    tokens = documents = 0
    largest = -1
    for member, npy, payload in zip(index.ends, payloads[0::2], payloads[1::2], strict=True):
        place, ids = f"at offset {int(member['offset']):,}", payload.view(manifest.numpy_dtype)
        held = npy[npy_header(npy) :]
        if len(held) != 4 * int(member["documents"]):
            yield (
                f"the document ends {place} are {len(held):,} bytes, the index says "
                f"{int(member['documents']):,} documents"
            )
            continue
        ends = held.view("<u4").astype(np.int64)
        if (np.diff(ends, prepend=0) <= 0).any() or (len(ends) and ends[-1] > len(ids)):
            yield f"document ends {place} do not rise within the chunk"
        elif manifest.tokenizer and (ids[ends - 1] != manifest.tokenizer.eod_id).any():
            yield f"a document {place} does not end with the end-of-document id"
        tokens = tokens + len(ids)
        documents = documents + len(ends)
        largest = max(largest, int(ids.max(initial=0)))
    if (tokens, documents, largest) != (entry.tokens, entry.documents, entry.max_id):
        yield (
            f"holds {tokens:,} tokens in {documents:,} documents, largest id {largest}; "
            f"its manifest says {entry.tokens:,}, {entry.documents:,}, {entry.max_id}"
        )
    if manifest.tokenizer and largest >= manifest.tokenizer.vocab_size:
        yield f"holds id {largest}, outside the vocabulary of {manifest.tokenizer.vocab_size}"
