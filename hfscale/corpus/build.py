"""From a corpus to token shards: ``PATH/train`` and ``PATH/validation``, each with its manifest.

One process reads, splits and writes; the others tokenize. What is written depends on the documents, the tokenizer and
the sizes alone: not on the number of processes, and not on how often the build was killed and run again.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hfscale.config.schema import CorpusConfig, ShardBuild
from hfscale.corpus.ledger import Ledger, Mark, open_ledger
from hfscale.corpus.source import Corpus, open_corpus
from hfscale.corpus.split import Counts, Document, Side, assign, check_sides
from hfscale.dist.world import available_cores
from hfscale.encoding import encode_documents
from hfscale.errors import DataError
from hfscale.log import progress_bar
from hfscale.shards import manifest as manifests
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.writer import ShardWriter
from hfscale.tokenizer import end_of_document_id, load_tokenizer, tokenizer_digest, vocabulary_size


def build_shards(config: CorpusConfig) -> dict[Side, Manifest]:
    """Return the manifests of the shards under ``config.shards.path``, built, finished, or found finished.

    Raises:
        DataError: for a source without documents, a missing tokenizer, a folder that holds another build, a source that
            changed since the build was interrupted, or a full disk. The same call continues what was begun.
    """
    corpus = open_corpus(config.source)
    tokenizer = load_tokenizer(config.tokenizer.path)
    info = TokenizerInfo(tokenizer_digest(config.tokenizer.path), vocabulary_size(tokenizer), end_of_document_id(tokenizer))
    sides: list[Side] = ["train", "validation"] if config.split.validation else ["train"]
    shards = config.shards
    dtype = np.dtype("<u2" if info.vocab_size <= 2**16 else "<u4")
    chunk_tokens = max(1, round(shards.chunk_mb * 1e6 / dtype.itemsize))
    shard_chunks = max(1, round(shards.shard_mb / shards.chunk_mb))
    plan: dict[str, Any] = {
        "version": manifests.VERSION, "source": corpus.describe(), "split": config.split.model_dump(), "tokenizer": asdict(info),
        "shards": {"name": shards.name, "dtype": dtype.name, "chunk_tokens": chunk_tokens, "shard_chunks": shard_chunks}}
    check_sides(config, sides)
    with open_ledger(shards.path, plan) as ledger:
        folders = {side: shards.path / side for side in sides}
        if all((folder / manifests.FILE_NAME).exists() for folder in folders.values()):
            return {side: Manifest.load(folder) for side, folder in folders.items()}
        writers = {side: _Side(side, folders[side], shards, dtype, chunk_tokens, shard_chunks, ledger) for side in sides}
        counts = _write(config, corpus, writers, tokenizer.backend_tokenizer.to_str(), eod_id=info.eod_id, dtype=dtype.str)
        source = {**plan["source"], "split": plan["split"], "seen": {**asdict(counts), "undecodable": corpus.undecodable}}
        built = {side: Manifest(dtype=dtype.name, tokenizer=info, source={**source, "side": side}, shards=tuple(ledger.shards[side]),
                                folder=folders[side]) for side in sides}
        for side, manifest in built.items():
            manifest.save(folders[side])
        return built


def _write(config: CorpusConfig, corpus: Corpus, sides: dict[Side, _Side], tokenizer_json: str, *, eod_id: int, dtype: str) -> Counts:
    """Return what was seen, once every document is in a shard."""
    counts, tokens = Counts(), 0
    procs = available_cores() if config.shards.procs == "auto" else config.shards.procs
    with progress_bar("tokenizing", corpus.total_bytes or None) as bar:
        def pending() -> Iterator[Document]:
            for document in assign(corpus.documents(), config.split, counts):
                if sides[document.side].wants(document):
                    yield document
                else:
                    bar.update(document.size)

        for document, ids in encode_documents(pending(), tokenizer_json, eod_id=eod_id, dtype=dtype, procs=procs, setting="shards.procs"):
            sides[document.side].add(document, ids)
            tokens += len(ids)
            bar.set_postfix_str(f"{tokens / 1e6:.1f} M tokens", refresh=False)
            bar.update(document.size)
    for side in sides.values():
        side.close()
    return counts


class _Side:
    """One side's shards: what is committed is skipped, what follows is written."""

    def __init__(self, side: Side, folder: Path, shards: ShardBuild, dtype: np.dtype[Any], chunk_tokens: int, shard_chunks: int,
                 ledger: Ledger) -> None:
        self._side, self._folder, self._ledger = side, folder, ledger
        for shard in ledger.shards[side]:
            path = folder / shard.name
            size = path.stat().st_size if path.exists() else None
            if size != shard.bytes or not (folder / shard.index_name).exists():
                raise DataError("a shard of the interrupted build is missing or has another size", where=path, value=size,
                                remedy=f"restore its {shard.bytes:,} bytes and its index, or remove the folder and build again")
        self._mark = ledger.marks[side]
        self._marked = self._mark.documents + (self._mark.offset > 0)  # documents that its digest speaks of
        self._read = self._passed = 0  # documents that were read; that are skipped or in the writer
        self._hash = hashlib.blake2b(digest_size=16)  # of the documents passed
        self._length = self._skipped = 0  # tokens of the document under way; of them skipped
        self._writer = ShardWriter(folder, name=shards.name, dtype=dtype, chunk_tokens=chunk_tokens, shard_chunks=shard_chunks,
                                   committed=self._commit, first=len(ledger.shards[side]))

    def wants(self, document: Document) -> bool:
        """Return False for a document that lies in committed shards as a whole."""
        self._read += 1
        if self._read <= self._mark.documents:
            self._pass(document)
            return False
        return True

    def add(self, document: Document, ids: np.ndarray) -> None:
        """Return with the part of the document that is not yet in shards written."""
        self._length, self._skipped = len(ids), self._mark.offset if self._passed == self._mark.documents else 0
        self._pass(document)
        self._writer.add(ids[self._skipped:])

    def close(self) -> None:
        """Return with the last shard committed."""
        if self._passed < self._marked:
            raise self._changed()
        self._writer.close()

    def _pass(self, document: Document) -> None:
        self._passed += 1
        self._hash.update(document.digest)
        if self._passed == self._marked and self._hash.hexdigest() != self._mark.digest:
            raise self._changed()

    def _commit(self, shard: ShardEntry) -> None:
        at = self._skipped + self._writer.taken
        cut = at < self._length  # the document under way goes on in the next shard
        self._ledger.commit(self._side, shard, Mark(self._passed - cut, at if cut else 0, self._hash.hexdigest()))

    def _changed(self) -> DataError:
        return DataError("the source has changed since this build was interrupted", where=self._folder,
                         remedy="restore the source and run again, or set shards.path to a new folder")
