"""Which side a document falls on, by a hash of its text: it never changes sides, whatever is added
around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from hfscale.config.corpus import CorpusConfig, Split
from hfscale.corpus.source import open_corpus
from hfscale.errors import DataError
from hfscale.shards.counts import Counts, seen_line

Side = Literal["train", "validation"]
DIGEST_BYTES = 16  # of BLAKE2b: a false duplicate among 10^12 documents has a chance of 10^-15


class Document(NamedTuple):
    """A text that is kept, and where it goes."""

    side: Side
    text: str
    digest: bytes
    size: int  # bytes of UTF-8


def side_of(digest: bytes, split: Split) -> Side:
    """Return the side of the document with this digest: about ``split.validation`` of all are held
    out.
    """
    draw = hashlib.blake2b(
        digest, digest_size=8, key=hashlib.sha256(split.salt.encode()).digest()
    ).digest()
    return "validation" if int.from_bytes(draw, "little") < split.validation * 2**64 else "train"


def check_sides(config: CorpusConfig, sides: Iterable[Side]) -> None:
    """Return if each of the ``sides`` gets a document: for whoever would else find out at the end.
    Reads no further than it must.

    Raises:
        DataError: if one gets none; it names a fraction that works.
    """
    wanted = set(sides)
    counts, corpus, digests = Counts(), open_corpus(config.source), []
    for document in assign(corpus.documents(counts), config.split, counts, at=corpus.at):
        wanted.discard(document.side)
        digests.append(document.digest)
        if not wanted:
            return
    if not digests:
        raise DataError(
            "the source holds no text",
            where=config.source.path,
            value=seen_line(counts.record()),
            remedy="look at source.path and source.pattern",
        )
    works = next(
        (
            fraction
            for fraction in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
            if len(
                {
                    side_of(digest, config.split.model_copy(update={"validation": fraction}))
                    for digest in digests
                }
            )
            == 2
        ),
        None,
    )
    enough = (
        f"split.validation={works} gives both sides some"
        if works
        else "cut text files into more (source.document_mb)"
    )
    raise DataError(
        f"none of {len(digests):,} documents fell to the {wanted.pop()} side",
        where="split.validation",
        value=config.split.validation,
        remedy=f"{enough}; split.validation=0 holds nothing out",
    )


def assign(
    texts: Iterable[str], split: Split, counts: Counts, *, at: Callable[[], str] = str
) -> Iterator[Document]:
    """Yield each distinct, non-empty document once, with its side; what is left out is counted in
    ``counts``, ``at`` its place.

    Remembers a digest a document: about 100 bytes of memory each.
    """
    seen: set[bytes] = set()
    for text in texts:
        counts.documents += 1
        if not text or text.isspace():
            counts.leave_out("empty", at())
            continue
        try:
            data = text.encode()
        except UnicodeEncodeError:
            counts.leave_out("invalid", at())
            continue
        digest = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
        if digest in seen:
            counts.leave_out("duplicates", "")
            continue
        seen.add(digest)
        yield Document(side_of(digest, split), text, digest, len(data))
