"""Everything that can be checked about shards on disk, all findings in one list."""
from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from hfscale.errors import DataError
from hfscale.shards.index import ShardIndex
from hfscale.shards.manifest import FILE_NAME, TEXT, Manifest, ShardEntry
from hfscale.shards.reader import member_name
from hfscale.shards.tars import walk

BLOCK = 1 << 24


def manifests_at(path: str | Path) -> list[Manifest]:
    """Return the manifest at ``path``, or those of its sub-folders (``train``, ``validation``).

    Raises:
        DataError: if there is none.
    """
    folder = Path(path)
    inner = sorted(folder.glob(f"*/{FILE_NAME}")) if folder.is_dir() and not (folder / FILE_NAME).exists() else []
    return [Manifest.load(one) for one in inner or [folder]]


def verify(manifest: Manifest, *, threads: int, advance: Callable[[int], object] = lambda size: None) -> list[str]:
    """Return what is wrong with the shards of ``manifest``, one line a finding; ``advance`` is told the bytes of each that is done."""
    def check(entry: ShardEntry) -> list[str]:
        findings = [f"{manifest.folder / entry.name}: {finding}" for finding in _check(manifest, entry)]
        advance(entry.bytes)
        return findings

    with ThreadPoolExecutor(threads) as pool:  # hashing leaves the interpreter free
        return [finding for findings in pool.map(check, manifest.shards) for finding in findings]


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


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
        members = list(walk(path))
    except DataError as error:
        yield error.what if error.where == str(path) else f"{error.what} ({error.where})"
        return
    if index.tar_digest != entry.digest:
        yield "the index belongs to another shard"
    with open(path, "rb") as file:
        names = {member.offset: member.name for member in members}
        for member in index.members:
            file.seek(int(member["offset"]))
            if xxhash.xxh3_64_intdigest(file.read(int(member["bytes"]))) != int(member["checksum"]):
                offset = int(member["offset"])
                yield f"member {names.get(offset, '(not in the tar)')} at offset {offset:,} does not match its checksum"
    if manifest.dtype != TEXT:
        yield from _check_tokens(manifest, entry, index, [(m.name, m.offset, m.size) for m in members])


def _check_tokens(manifest: Manifest, entry: ShardEntry, index: ShardIndex, in_tar: list[tuple[str, int, int]]) -> Iterator[str]:
    indexed = [(member_name(k // 2, ("ends.npy", "tokens.bin")[k % 2]), int(member["offset"]), int(member["bytes"]))
               for k, member in enumerate(index.members)]
    if indexed != in_tar:
        yield "the members of the tar are not those of the index"
        return
    if (index.tokens["bytes"] != index.tokens["tokens"] * manifest.numpy_dtype.itemsize).any():
        yield f"the manifest says {manifest.dtype}, but the chunks have another number of bytes a token"
        return
    tokens = documents = 0
    largest = -1
    with open(manifest.folder / entry.name, "rb") as file:
        for ends_member, tokens_member in zip(index.ends, index.tokens, strict=True):
            file.seek(int(tokens_member["offset"]))
            ids = np.frombuffer(file.read(int(tokens_member["bytes"])), manifest.numpy_dtype)
            file.seek(int(ends_member["offset"]))
            try:
                ends = np.load(io.BytesIO(file.read(int(ends_member["bytes"]))), allow_pickle=False)
            except (ValueError, EOFError) as error:
                yield f"document ends at offset {int(ends_member['offset']):,} are not an array: {error}"
                continue
            if (np.diff(ends.astype(np.int64), prepend=0) <= 0).any() or (len(ends) and ends[-1] > len(ids)):
                yield f"document ends at offset {int(ends_member['offset']):,} do not rise within the chunk"
            elif manifest.tokenizer and (ids[ends.astype(np.int64) - 1] != manifest.tokenizer.eod_id).any():
                yield f"a document at offset {int(ends_member['offset']):,} does not end with the end-of-document id"
            tokens, documents, largest = tokens + len(ids), documents + len(ends), max(largest, int(ids.max(initial=0)))
    if (tokens, documents, largest) != (entry.tokens, entry.documents, entry.max_id):
        yield (f"holds {tokens:,} tokens in {documents:,} documents, largest id {largest}; "
               f"its manifest says {entry.tokens:,}, {entry.documents:,}, {entry.max_id}")
    if manifest.tokenizer and largest >= manifest.tokenizer.vocab_size:
        yield f"holds id {largest}, outside the vocabulary of {manifest.tokenizer.vocab_size}"
