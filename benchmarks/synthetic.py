"""A corpus without text: a tokenizer of made-up words, and token shards of random documents that a
model can learn from.

Ids are drawn from a Zipf-like distribution, and a third of them repeat what stood eight tokens
before, so losses fall.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.writer import ShardWriter
from hfscale.tokenizer import tokenizer_digest

END = "<end>"
LAG = 8


def make_tokenizer(folder: Path, *, vocab_size: int, sentinels: int = 0) -> Path:
    """Return ``folder`` with a fast tokenizer of ``vocab_size`` words, of which 0 ends a document.

    With every special token that an objective may need, behind the words: ``sentinels`` of them
    stand for hidden spans.
    """
    words = {END: 0, **{f"w{k}": k for k in range(1, vocab_size)}}
    plain = Tokenizer(WordLevel(words, unk_token=END))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        eos_token=END,
        pad_token="<pad>",
        mask_token="<mask>",
        cls_token="<cls>",
    )
    tokenizer.add_tokens(
        [AddedToken(f"<extra_id_{k}>", special=True) for k in range(sentinels)], special_tokens=True
    )
    tokenizer.save_pretrained(folder)
    return folder


def make_shards(
    folder: Path, *, tokenizer: Path, vocab_size: int, tokens: int, seed: int = 0
) -> Path:
    """Return ``folder`` with shards and manifest of at least ``tokens`` random tokens, in documents
    of 500 on average.
    """
    documents = random_documents(vocab_size, tokens, np.random.default_rng(seed))
    return write_shards(folder, documents, tokenizer=tokenizer, vocab_size=vocab_size)


def random_documents(
    vocab_size: int, tokens: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield documents of at least ``tokens`` ids in all."""
    while tokens > 0:
        ids = 1 + ((vocab_size - 1) * rng.random(2**16) ** 4).astype(np.int64)
        repeated = np.flatnonzero(rng.random(2**16) < 1 / 3)
        repeated = repeated[repeated >= LAG]
        ids[repeated] = ids[repeated - LAG]
        yield from np.split(ids, np.flatnonzero(rng.random(2**16) < 1 / 500))
        tokens -= len(ids)


def write_shards(
    folder: Path, documents: Iterable[np.ndarray], *, tokenizer: Path, vocab_size: int
) -> Path:
    """Return ``folder`` with shards and manifest of ``documents`` (ids), each with its end
    added.
    """
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    entries: list[ShardEntry] = []
    writer = ShardWriter(
        folder,
        name="random",
        dtype=dtype,
        chunk_tokens=2**19,
        shard_chunks=32,
        committed=entries.append,
    )
    for document in documents:
        writer.add(np.append(document, 0).astype(dtype))
    writer.close()
    info = TokenizerInfo(digest=tokenizer_digest(tokenizer), vocab_size=vocab_size, eod_id=0)
    Manifest(
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        tokenizer=info,
        source={"description": "random ids"},
        shards=tuple(entries),
    ).save(folder)
    return folder
