"""What shards hold, in numbers: lengths of documents, and how well counting tokens alone predicts
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfscale.errors import DataError, UserError
from hfscale.shards.counts import seen_line
from hfscale.shards.manifest import TEXT, Manifest
from hfscale.shards.reader import ShardReader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READ_TOKENS = 1 << 20
BAR = 40  # characters of the longest bar


def document_lengths(manifest: Manifest) -> np.ndarray:
    """Return the tokens of each document (int64), its end-of-document id included, in order."""
    ends, base = [np.zeros(1, np.int64)], 0
    for reader in _readers(manifest):
        ends.append(reader.ends() + base)
        base += len(reader)
    return np.diff(np.concatenate(ends))


def describe(manifest: Manifest) -> str:
    """Return a screen of text: totals and, for token shards, a histogram of document lengths by
    powers of two.
    """
    lines = [
        f"{manifest.folder}",
        f"  shards     {len(manifest.shards):,}",
        f"  bytes      {manifest.bytes:,}",
        f"  documents  {manifest.documents:,}",
    ]
    if tokenizer := manifest.tokenizer:
        lines += [
            f"  tokens     {manifest.tokens:,} ({manifest.dtype})",
            f"  vocabulary {tokenizer.vocab_size:,}, largest id {manifest.max_id:,}, end of "
            f"document {tokenizer.eod_id}",
        ]
    lines.append(f"  fingerprint {manifest.fingerprint}")
    if manifest.seen:
        lines.append(f"  of all sides: {seen_line(manifest.seen)}")
    if manifest.dtype != TEXT and manifest.documents:
        lengths = document_lengths(manifest)
        lines.append(
            f"  tokens a document: mean {lengths.mean():,.1f}, median "
            f"{np.median(lengths):,.0f}, longest {lengths.max():,}"
        )
        counts = histogram(lengths)
        for power in range(int(np.flatnonzero(counts)[0]), len(counts)):
            bar = "#" * -(-int(counts[power]) * BAR // int(counts.max()))
            lines.append(
                f"  {2**power:>11,} - {2 ** (power + 1) - 1:<11,} {counts[power]:>9,} {bar}"
            )
    return "\n".join(lines)


def histogram(lengths: np.ndarray) -> np.ndarray:
    """Return how many ``lengths`` (from 1 on) are in [2**k, 2**(k + 1)), for each k from 0 on."""
    return np.bincount(np.frexp(lengths)[1] - 1)  # floor of log2


def draw(manifests: Mapping[str, Manifest], path: Path) -> None:
    """Return with the document lengths of each of the named manifests drawn into ``path``, a PNG.

    Raises:
        UserError: as ``picture``.
    """
    with picture(path, width=8, height=4.5) as figure:
        axes = figure.subplots()
        for name, manifest in manifests.items():
            counts = histogram(document_lengths(manifest))
            axes.stairs(
                counts,
                2.0 ** np.arange(len(counts) + 1),
                fill=True,
                alpha=0.5,
                label=f"{name}: {manifest.documents:,} documents",
            )
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="tokens a document",
            ylabel="documents",
            title="Lengths of documents",
        )
        axes.legend()


@contextmanager
def picture(path: Path, *, width: float, height: float) -> Iterator[Figure]:
    """Yield a matplotlib figure of so many inches, which is a PNG at ``path`` afterwards.

    Raises:
        UserError: if matplotlib is not installed, or the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "a picture needs matplotlib, which is not installed",
            where="--png",
            remedy="pip install matplotlib",
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise UserError(
            f"cannot write the picture: {error.strerror}", where=path, remedy="choose another file"
        ) from None


def unigram_entropy(train: Manifest, validation: Manifest) -> float:
    """Return the cross-entropy in nats a token of ``validation`` under ``train``'s token
    frequencies, add-one smoothed.

    A model that has learnt nothing but how frequent each token is scores this loss.

    Raises:
        DataError: if the two were made with different tokenizers, or ``validation`` is empty.
    """
    if train.tokenizer is None or train.tokenizer != validation.tokenizer:
        raise DataError(
            "the two sets of shards were made with different tokenizers",
            where=f"{train.folder} and {validation.folder}",
        )
    if not validation.tokens:
        raise DataError("there are no tokens to score", where=validation.folder)
    probabilities = _counts(train) + 1.0
    log_probabilities = np.log(probabilities / probabilities.sum())
    return float(-(_counts(validation) @ log_probabilities) / validation.tokens)


def _counts(manifest: Manifest) -> np.ndarray:
    assert manifest.tokenizer is not None
    counts = np.zeros(max(manifest.tokenizer.vocab_size, manifest.max_id + 1), np.int64)
    ids = np.empty(READ_TOKENS, np.int64)
    for reader in _readers(manifest):
        for start in range(0, len(reader), READ_TOKENS):
            stop = min(start + READ_TOKENS, len(reader))
            reader.read_tokens(start, stop, ids[: stop - start])
            counts += np.bincount(ids[: stop - start], minlength=len(counts))
    return counts


def _readers(manifest: Manifest) -> Iterator[ShardReader]:
    if manifest.dtype == TEXT:
        raise DataError(
            "these are tars of raw text, not of tokens",
            where=manifest.folder,
            remedy="leave --png out: tokens are not counted before raw text is tokenized",
        )
    for entry in manifest.shards:
        with manifest.local(entry):
            yield ShardReader(manifest.folder, entry, dtype=manifest.numpy_dtype)
