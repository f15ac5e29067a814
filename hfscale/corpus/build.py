"""From a corpus to token shards: ``PATH/train`` and ``PATH/validation``, each with its manifest.

One process reads, splits and writes; the others tokenize. What is written depends on the documents,
the tokenizer and the sizes alone: not on the number of processes, and not on how often the build
was killed and run again.

Several machines share a build in parts. Each tokenizes a part of the files into a folder of its
own, PATH-parts/3-of-8, and remembers the digests of its documents; whoever then finds all parts
there merges them. The merge sends the parts' documents, in their order, through the writer of an
ordinary build, which drops what an earlier part has: so the bytes are those of one process again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hfscale.config.corpus import CorpusConfig, ShardBuild
from hfscale.corpus.ledger import BuildUnderWay, Ledger, Mark, open_ledger
from hfscale.corpus.source import Corpus, open_corpus
from hfscale.corpus.split import DIGEST_BYTES, Document, Side, assign, check_sides
from hfscale.dist.world import available_cores
from hfscale.encoding import VERSION as ENCODING
from hfscale.encoding import encode_documents
from hfscale.errors import DataError
from hfscale.log import progress_bar
from hfscale.shards import manifest as manifests
from hfscale.shards.counts import Counts
from hfscale.shards.files import write_atomically
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.reader import ShardReader
from hfscale.shards.writer import ShardWriter
from hfscale.tokenizer import end_of_document_id, load_tokenizer, tokenizer_digest, vocabulary_size

DIGESTS = "digests.bin"  # of a part: those of a side's documents, in their order

Feed = Callable[[Mapping[Side, "_Side"], Counts], Iterator[tuple[Document, np.ndarray]]]


def build_shards(config: CorpusConfig) -> dict[Side, Manifest]:
    """Return the manifests of the shards under ``config.shards.path``, built, finished, or found
    finished.

    Raises:
        DataError: for a source without documents, a missing tokenizer, a folder that holds another
            build, a source that changed since the build was interrupted, or a full disk. The same
            call continues what was begun.
    """
    build = _Build(config)
    return build.run(config.shards.path, build.tokenized(build.corpus))


def build_part(
    config: CorpusConfig, *, number: int, count: int
) -> tuple[dict[Side, Manifest], list[int]]:
    """Return the manifests of the whole build if this call finished it, after building part
    ``number`` (from 0) of ``count``; else none, and the parts that are missing: none of them while
    another process merges.

    Raises:
        DataError: as ``build_shards``; and for a data set of the hub.
    """
    build, path = _Build(config), config.shards.path
    folders = [path.with_name(f"{path.name}-parts") / f"{part}-of-{count}" for part in range(count)]
    if not build.finished(path):
        build.run(folders[number], build.tokenized(build.corpus.part(number, count)))
        missing = [part for part, folder in enumerate(folders) if not build.finished(folder)]
        if missing and not build.finished(path):
            return {}, missing
    try:
        built = build.run(path, build.merged(folders))
    except BuildUnderWay:
        return {}, []
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # there is none, or it holds something else
        folders[0].parent.rmdir()
    return built, []


class _Build:
    """What a corpus is to become, and the ways to get there."""

    def __init__(self, config: CorpusConfig) -> None:
        self._config, self.corpus, shards = config, open_corpus(config.source), config.shards
        self._tokenizer = load_tokenizer(config.tokenizer.path)
        self._info = TokenizerInfo(
            tokenizer_digest(config.tokenizer.path),
            vocabulary_size(self._tokenizer),
            end_of_document_id(self._tokenizer),
        )
        self._sides: list[Side] = ["train", "validation"] if config.split.validation else ["train"]
        self._dtype = np.dtype("<u2" if self._info.vocab_size <= 2**16 else "<u4")
        self._source = {
            **self.corpus.describe(),
            "split": config.split.model_dump(),
            "encoding": ENCODING,
        }
        self._chunk_tokens = max(1, round(shards.chunk_mb * 1e6 / self._dtype.itemsize))
        self._shard_chunks = max(1, round(shards.shard_mb / shards.chunk_mb))
        check_sides(config, self._sides)

    def finished(self, folder: Path) -> bool:
        """Return whether all sides in ``folder`` have their manifest."""
        # listed, not looked up: a network file system may go on remembering that a name was not
        # there
        return all(
            (folder / side).is_dir() and manifests.FILE_NAME in os.listdir(folder / side)
            for side in self._sides
        )

    def run(self, folder: Path, feed: Feed) -> dict[Side, Manifest]:
        """Return the manifests of what ``feed`` yields, now in shards under ``folder``, or found
        there finished.
        """
        shards = self._config.shards
        plan: dict[str, object] = {
            "version": manifests.VERSION,
            "source": self.corpus.describe(),
            "split": self._config.split.model_dump(),
            "tokenizer": asdict(self._info),
            "encoding": ENCODING,
            "shards": {
                "name": shards.name,
                "dtype": self._dtype.name,
                "chunk_tokens": self._chunk_tokens,
                "shard_chunks": self._shard_chunks,
            },
        }
        finished = self.finished(folder)
        with open_ledger(folder, plan, finished=finished) as ledger:
            folders, counts = {side: folder / side for side in self._sides}, Counts()
            if finished or self.finished(folder):
                return {side: Manifest.load(path) for side, path in folders.items()}
            sides = {
                side: _Side(
                    side,
                    folders[side],
                    shards,
                    self._dtype,
                    self._chunk_tokens,
                    self._shard_chunks,
                    ledger,
                )
                for side in self._sides
            }
            for document, ids in feed(sides, counts):
                sides[document.side].add(document, ids)
            for writer in sides.values():
                writer.close()
            built = {
                side: Manifest(
                    dtype=self._dtype.name,
                    tokenizer=self._info,
                    shards=tuple(ledger.shards[side]),
                    folder=folders[side],
                    source={**self._source, "seen": counts.record().as_dict(), "side": side},
                )
                for side in self._sides
            }
            ledger.finish(counts.record())
            for side, manifest in built.items():
                if folder != shards.path:
                    write_atomically(folders[side] / DIGESTS, bytes(sides[side].digests))
                manifest.save(folders[side])
            return built

    def tokenized(self, corpus: Corpus) -> Feed:
        """Return what yields the documents of ``corpus`` that are not in shards yet, with their
        ids.
        """
        config, procs = self._config, self._config.shards.procs

        def feed(
            sides: Mapping[Side, _Side], counts: Counts
        ) -> Iterator[tuple[Document, np.ndarray]]:
            tokens = 0
            with progress_bar("tokenizing", corpus.total_bytes or None) as bar:

                def pending() -> Iterator[Document]:
                    documents = corpus.documents(counts)
                    for document in assign(documents, config.split, counts, at=corpus.at):
                        if sides[document.side].wants(document):
                            yield document
                        else:
                            bar.update(document.size)

                for document, ids in encode_documents(
                    pending(),
                    self._tokenizer.backend_tokenizer.to_str(),
                    eod_id=self._info.eod_id,
                    dtype=self._dtype.str,
                    procs=available_cores() if procs == "auto" else procs,
                    setting="shards.procs",
                ):
                    yield document, ids
                    tokens += len(ids)
                    bar.set_postfix_str(f"{tokens / 1e6:.1f} M tokens", refresh=False)
                    bar.update(document.size)

        return feed

    def merged(self, folders: list[Path]) -> Feed:
        """Return what yields the documents of the parts in ``folders``, side after side, each
        document where it is seen first.
        """

        def feed(
            sides: Mapping[Side, _Side], counts: Counts
        ) -> Iterator[tuple[Document, np.ndarray]]:
            for side in self._sides:
                parts, seen = [Manifest.load(folder / side) for folder in folders], set[bytes]()
                for part in parts:
                    origin = {**part.source, "tokenizer": part.tokenizer}
                    if origin != {
                        **self._source,
                        "seen": part.source["seen"],
                        "side": side,
                        "tokenizer": self._info,
                    }:
                        raise DataError(
                            "a part was built from something else",
                            where=part.folder,
                            remedy="remove the folders of parts and build them again",
                        )
                for part in parts:
                    digests = (part.folder / DIGESTS).read_bytes()
                    for number, ids in enumerate(_documents(part)):
                        document = Document(
                            side,
                            "",
                            digests[DIGEST_BYTES * number : DIGEST_BYTES * (number + 1)],
                            0,
                        )
                        if document.digest in seen:
                            counts.leave_out("duplicates", "")
                        if document.digest not in seen and sides[side].wants(document):
                            yield document, ids
                        seen.add(document.digest)
            for part in parts:
                if part.seen:
                    counts.add(part.seen)

        return feed


def _documents(manifest: Manifest) -> Iterator[np.ndarray]:
    """Yield the ids of each document of token shards, in their order."""
    begun: list[np.ndarray] = []  # of a document that goes on in the next shard
    for entry in manifest.shards:
        reader = ShardReader(manifest.folder, entry, dtype=manifest.numpy_dtype)
        tokens = np.empty(len(reader), manifest.numpy_dtype)
        reader.read_tokens(0, len(reader), tokens)
        *whole, rest = np.split(tokens, reader.ends())
        for document in whole:
            yield np.concatenate([*begun, document]) if begun else document
            begun = []
        begun.append(rest)


class _Side:
    """One side's shards: what is committed is skipped, what follows is written."""

    def __init__(
        self,
        side: Side,
        folder: Path,
        shards: ShardBuild,
        dtype: np.dtype[np.generic],
        chunk_tokens: int,
        shard_chunks: int,
        ledger: Ledger,
    ) -> None:
        self._side, self._folder, self._ledger = side, folder, ledger
        for shard in ledger.shards[side]:
            path = folder / shard.name
            size = path.stat().st_size if path.exists() else None
            if size != shard.bytes or not (folder / shard.index_name).exists():
                raise DataError(
                    "a shard of the interrupted build is missing or has another size",
                    where=path,
                    value=size,
                    remedy=f"restore its {shard.bytes:,} bytes and its index, or remove the "
                    "folder and build again",
                )
        self._mark = ledger.marks[side]
        # documents that its digest speaks of
        self._marked = self._mark.documents + (self._mark.offset > 0)
        self._read = self._passed = 0  # documents that were read; that are skipped or in the writer
        self._hash = hashlib.blake2b(digest_size=16)  # of the documents passed
        self.digests = bytearray()  # and one after the other
        self._length = self._skipped = 0  # tokens of the document under way; of them skipped
        self._writer = ShardWriter(
            folder,
            name=shards.name,
            dtype=dtype,
            chunk_tokens=chunk_tokens,
            shard_chunks=shard_chunks,
            committed=self._commit,
            first=len(ledger.shards[side]),
        )

    def wants(self, document: Document) -> bool:
        """Return False for a document that lies in committed shards as a whole."""
        self._read += 1
        if self._read <= self._mark.documents:
            self._pass(document)
            return False
        return True

    def add(self, document: Document, ids: np.ndarray) -> None:
        """Return with the part of the document that is not yet in shards written."""
        self._length = len(ids)
        self._skipped = self._mark.offset if self._passed == self._mark.documents else 0
        self._pass(document)
        self._writer.add(ids[self._skipped :])

    def close(self) -> None:
        """Return with the last shard committed."""
        if self._passed < self._marked:
            raise self._changed()
        self._writer.close()

    def _pass(self, document: Document) -> None:
        self._passed += 1
        self._hash.update(document.digest)
        self.digests += document.digest
        if self._passed == self._marked and self._hash.hexdigest() != self._mark.digest:
            raise self._changed()

    def _commit(self, shard: ShardEntry) -> None:
        at = self._skipped + self._writer.taken
        cut = at < self._length  # the document under way goes on in the next shard
        self._ledger.commit(
            self._side, shard, Mark(self._passed - cut, at if cut else 0, self._hash.hexdigest())
        )

    def _changed(self) -> DataError:
        return DataError(
            "the source has changed since this build was interrupted",
            where=self._folder,
            remedy="restore the source and run again, or set shards.path to a new folder",
        )
