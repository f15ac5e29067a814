"""How many bytes of text each token id stands for, where a tokenizer lets that be known: what bits
a byte divide by.

To decode rows would not do: a character that a row cuts in two comes out as a sign of three bytes,
special tokens are lost, and the tokenizers that change a text before they cut it give another text
back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfscale.errors import DataError
from hfscale.records import Record, parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"  # SentencePiece's sign for a space
UNKNOWN = -1  # bytes of a token that says only that there was something


class _Part(Record):
    """A normalizer, a pre-tokenizer or a decoder; or a sequence of them."""

    type: str
    normalizers: list[_Part] | None = None
    pretokenizers: list[_Part] | None = None
    decoders: list[_Part] | None = None
    add_prefix_space: bool | None = None
    prepend_scheme: str | None = None
    pattern: object = None
    content: object = None


class _Model(Record):
    """What cuts words into tokens."""

    type: str
    byte_fallback: bool | None = None


class _Added(Record):
    """A token beside the vocabulary."""

    id: int
    content: str


class _Tokenizer(Record):
    """What ``tokenizers`` says of itself, as far as it tells which bytes a token stands for."""

    normalizer: _Part | None
    pre_tokenizer: _Part | None
    decoder: _Part | None
    model: _Model
    added_tokens: list[_Added]


class TokenBytes:
    """The bytes of each id, and of rows of them. An end of document stands for none, other special
    tokens for what they spell.

    Known for byte-level tokenizers, and for SentencePiece's BPE that falls back to bytes; both
    without any normalization but NFC, whose text is then the one that counts.

    Raises:
        DataError: for others; it says what loses bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, end_id: int) -> None:
        backend = parse(_Tokenizer, tokenizer.backend_tokenizer.to_str())
        self._end = end_id
        normalizers = _parts(backend.normalizer)
        # with a space that the text has not
        self._prefixed = any(
            part.type == "Prepend"
            or part.add_prefix_space
            or part.prepend_scheme not in (None, "never")
            for part in [*normalizers, *_parts(backend.pre_tokenizer)]
        )
        byte_level = any(part.type == "ByteLevel" for part in _parts(backend.decoder))
        changes = [
            part.type
            for part in normalizers
            if part.type not in ("NFC", "Prepend") and not _is_space_sign(part)
        ]
        if changes or not (byte_level or backend.model.byte_fallback):
            why = changes[0] if changes else f"{backend.model.type} without bytes"
            raise DataError(f"the tokenizer ({why}) does not keep every byte of a text")
        added = {token.id: token.content for token in backend.added_tokens}
        size = max([*tokenizer.get_vocab().values(), *added]) + 1
        self._bytes, self._begins = np.full(size, UNKNOWN), np.zeros(size, bool)
        alphabet = _byte_alphabet() if byte_level else set[str]()
        for token, number in tokenizer.get_vocab().items():
            if number in added:
                self._bytes[number] = len(added[number].encode())
            elif byte_level:
                self._bytes[number] = len(token) if alphabet.issuperset(token) else UNKNOWN
            else:
                one = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
                self._bytes[number] = 1 if one else len(token.replace(SPACE, " ").encode())
            self._begins[number] = token.startswith((SPACE, "\u0120"))
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown != self._end:
            self._bytes[unknown] = UNKNOWN
        self._bytes[self._end] = 0

    def of(self, ids_L: np.ndarray, scored_L: np.ndarray) -> int | None:
        """Return the bytes of the ``scored_L`` (bool) among a row's ids; None if it cannot be
        known.
        """
        bytes_L = self._bytes[ids_L].copy()
        if self._prefixed:
            first_L = np.concatenate([[False], ids_L[:-1] == self._end])
            bytes_L -= first_L & self._begins[ids_L]
        if (bytes_L[scored_L] < 0).any():
            return None
        return int(bytes_L[scored_L].sum())


def _parts(part: _Part | None) -> list[_Part]:
    """Return what a part of a tokenizer consists of, one after the other."""
    if part is None:
        return []
    for several in (part.normalizers, part.pretokenizers, part.decoders):
        if several is not None:
            return [inner for one in several for inner in _parts(one)]
    return [part]


def _is_space_sign(part: _Part) -> bool:
    return part.type == "Replace" and (part.pattern, part.content) == ({"String": " "}, SPACE)


def _byte_alphabet() -> set[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())
