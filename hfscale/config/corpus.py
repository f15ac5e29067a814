"""The config of a corpus: text, its split, a tokenizer trained on it, and shards built from it."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field

from hfscale.config.section import FileName, LocalPath, Positive, Section


class TextSource(Section):
    """Documents: a folder of files, tables with a text column, a ``datasets`` name, or tars of raw
    text.
    """

    format: Literal["text", "jsonl", "csv", "parquet", "hub", "webdataset"] = "text"
    path: str  # file, folder or glob; for "hub" the data set's name
    pattern: str = "**/*"  # which files of a folder; comma-separated globs
    exclude: str = ""  # which of them to leave out
    document_mb: Annotated[float, Field(gt=0)] = (
        4.0  # a longer text file becomes several documents, cut at line ends
    )
    field: str = (
        "text"  # column of a table, or the extension (and json field: "json.text") in a tar
    )
    subset: str | None = None  # "hub": the configuration
    hub_split: str = "train"


class Split(Section):
    """Which documents are held out: by a hash of the text, so a document never changes sides."""

    validation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    salt: str = ""


class TokenizerTraining(Section):
    """How a tokenizer is trained and where it is saved."""

    path: LocalPath
    kind: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    vocab_size: Annotated[int, Field(ge=260, le=10_000_000)] = 32768
    lowercase: bool = False  # wordpiece: BERT's uncased normalisation
    min_frequency: Positive = 2
    max_documents: Positive | None = None  # train on the first N documents only
    special_tokens: list[str] = []  # beside the kind's own


class ShardBuild(Section):
    """Where shards are written, and how large. ``path`` receives ``train/`` and ``validation/``."""

    path: LocalPath
    name: FileName = "shard"
    shard_mb: Annotated[float, Field(gt=0)] = 128.0  # a shard is put together in memory, one a side
    chunk_mb: Annotated[float, Field(gt=0)] = 2.0
    procs: Union[Literal["auto"], Positive] = "auto"


class CorpusConfig(Section):
    """From raw text to a tokenizer and shards: the CONFIG of ``tokenizer train`` and ``shards
    build``.
    """

    source: TextSource
    split: Split = Split()
    tokenizer: TokenizerTraining
    shards: ShardBuild
