"""Small corpora of token shards in which every token tells where it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.writer import ShardWriter


@dataclass
class Corpus:
    """A folder of shards, and what must be read from it: tokens and exclusive document ends of each
    shard.
    """

    folder: Path
    tokens: list[np.ndarray]
    ends: list[np.ndarray]


@pytest.fixture(scope="session")
def make_corpus(tmp_path_factory) -> Callable[..., Corpus]:
    """Return a maker of corpora: ``tokens`` random tokens in documents of about ``mean`` tokens, in
    small chunks and shards.
    """

    def make(
        tokens: int = 30_000,
        *,
        chunk_tokens: int = 700,
        shard_chunks: int = 4,
        mean: float = 60,
        dtype: str = "uint16",
        seed: int = 0,
    ) -> Corpus:
        folder, rng, entries = (
            tmp_path_factory.mktemp("corpus"),
            np.random.default_rng(seed),
            list[ShardEntry](),
        )
        stream = rng.integers(1, 60_000 if dtype == "uint16" else 2**31, tokens).astype(dtype)
        lengths = 1 + rng.exponential(mean, 2 + int(3 * tokens / mean)).astype(int)
        ends = np.cumsum(lengths)
        ends = np.append(ends[ends < tokens], tokens)
        writer = ShardWriter(
            folder,
            name="text",
            dtype=np.dtype(dtype),
            chunk_tokens=chunk_tokens,
            shard_chunks=shard_chunks,
            committed=entries.append,
        )
        for document in np.split(stream, ends[:-1]):
            writer.add(document)
        writer.close()
        Manifest(
            dtype=dtype,
            tokenizer=TokenizerInfo("digest", 60_000, 0),
            source={"seed": seed},
            shards=tuple(entries),
        ).save(folder)
        cuts = np.arange(0, tokens + 1, chunk_tokens * shard_chunks)[1:]
        starts = np.concatenate([[0], cuts])
        parts = [part for part in np.split(stream, cuts) if part.size]
        shard_ends = [
            ends[(ends > a) & (ends <= a + part.size)] - a
            for a, part in zip(starts, parts, strict=False)
        ]
        assert [entry.tokens for entry in entries] == [part.size for part in parts]
        return Corpus(folder, parts, shard_ends)

    return make
