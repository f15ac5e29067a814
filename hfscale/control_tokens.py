"""Text that stays text: only hfscale and templates put control tokens, whatever a text spells.

``ControlTokens`` finds them and keeps them out for one text, ``text_alone`` for a block of code,
``Quoted`` for texts inside of a template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import BatchEncoding, PreTrainedTokenizerFast


class NotText(ValueError):
    """Text spells a control token, and nothing keeps this tokenizer from making it one. The message
    is for people.
    """


class ControlTokens:
    """The special tokens of a tokenizer. Only hfscale and templates put them: text that spells one
    is encoded as the text it is.

    ``tokenizers`` looks for them before it does anything else, which its switch
    ``encode_special_tokens`` turns off. A model whose vocabulary has such a token as a piece
    (Unigram, say) finds it all the same: there the piece's first character is split off.
    """

    def __init__(self, backend: Tokenizer) -> None:
        special = {
            number: token.content
            for number, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self._backend, self._contents = backend, special
        self._unknown = _unknown_token(backend)
        # the longest first, as they are found
        ends = sorted(special.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ends)) or r"(?!)")
        self._table = np.zeros(max([backend.get_vocab_size(), *special]) + 1, bool)
        self._table[[*special]] = True

    def spelled_in(self, text: str) -> bool:
        """Return whether ``text`` spells one of them, as it is or once it is normalized."""
        if self._pattern.search(text):
            return True
        normalizer = self._backend.normalizer
        return bool(normalizer and self._pattern.search(normalizer.normalize_str(text)))

    def within(self, ids: np.ndarray | list[int], text: str) -> str | None:
        """Return one of them that is among the ``ids`` of ``text``, or None; the unknown token is
        what it says, unless ``text`` spells it.
        """
        ids = np.asarray(ids, None if len(ids) else np.int64)
        special = self._table[ids]
        for number in np.unique(ids[special]).tolist() if special.any() else ():
            content = self._contents[number]
            if content != self._unknown or content in text:
                return content
        return None

    def count(self, text: str) -> int:
        """Return how many stand in the text of a template."""
        return sum(token != self._unknown for token in self._pattern.findall(text))

    def count_ids(self, ids: list[int]) -> int:
        """Return how many are among ``ids``."""
        known = (self._contents.get(number, self._unknown) for number in ids)
        return sum(content != self._unknown for content in known)

    def quote(self, text: str, mark: str, *, keep: str | None = None) -> str:
        """Return ``text`` with ``mark`` behind the first character of each that it spells, except
        ``keep``.

        Raises:
            NotText: for one that has no second character.
        """

        def broken(match: re.Match[str]) -> str:
            token = match.group()
            if token == keep:
                return token
            if len(token) == 1:
                raise NotText(f"it holds the control token {token!r}, which cannot be kept as text")
            return token[0] + mark + token[1:]

        return self._pattern.sub(broken, text)

    @contextmanager
    def kept_out(self, backend: Tokenizer, *, mark: str = "") -> Iterator[None]:
        """Let no piece of the vocabulary of ``backend`` be one of them inside, and take ``mark``
        out of the text.
        """
        from tokenizers import normalizers, pre_tokenizers

        normalizer, pre_tokenizer, split = backend.normalizer, backend.pre_tokenizer, self._split
        backend.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizer, split]) if pre_tokenizer else split
        )
        if mark:
            strip = normalizers.Replace(mark, "")
            backend.normalizer = normalizers.Sequence(
                [strip, *([normalizer] if normalizer else [])]
            )
        try:
            yield
        finally:
            backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer

    @cached_property
    def _split(self) -> PreTokenizer:
        """What cuts the first character off from each of them."""
        from tokenizers import Regex, pre_tokenizers

        forms = {form for token in self._contents.values() for form in self._forms(token)}
        splits = "|".join(
            f"{re.escape(form[0])}(?={re.escape(form[1:])})"
            for form in sorted(forms)
            if len(form) > 1
        )
        return pre_tokenizers.Split(Regex(splits or "(?!)"), "isolated")

    def _forms(self, token: str) -> set[str]:
        """Return how a token may look where words are cut into pieces: normalized, with marks for
        spaces, or byte by byte.
        """
        normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        plain = normalizer.normalize_str(token) if normalizer else token
        parts = pre_tokenizer.pre_tokenize_str(plain) if pre_tokenizer else []
        return {token, plain, "".join(part for part, _ in parts)} - {""}


@contextmanager
def text_alone(tokenizer: PreTrainedTokenizerFast, *texts: str | None) -> Iterator[None]:
    """Let a transformers tokenizer take each of ``texts`` for text inside, whatever it spells.

    Raises:
        NotText: if it cannot.
    """
    control, backend = _control_tokens(tokenizer), tokenizer.backend_tokenizer
    spelled = [text for text in texts if text and control.spelled_in(text)]
    if not spelled:
        yield
        return
    before, tokenizer.split_special_tokens = tokenizer.split_special_tokens, True
    try:
        with control.kept_out(backend):
            for text in spelled:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                if token := control.within(ids, ""):
                    raise NotText(f"this tokenizer makes a control token of the text {token!r}")
            yield
    finally:
        tokenizer.split_special_tokens = backend.encode_special_tokens = before


class Quoted:
    """Texts of others in a template: inside, ``quote(text)`` goes into the template, and ``ids``
    encodes what comes of it.

    A mark that is in none of the ``texts`` stands in each control token that they spell, and is
    taken out once the control tokens of the template were found. ``keep`` is one that texts may
    put: the mask of a question.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *texts: str, keep: str | None = None
    ) -> None:
        self._tokenizer, self._keep = tokenizer, keep
        self._control = _control_tokens(tokenizer)
        self.mark = ""
        if any(self._control.spelled_in(text) for text in texts):
            free = (mark for mark in MARKS if not any(mark in text for text in texts))
            self.mark = next(free, "")
            if not self.mark:
                raise NotText(
                    "it spells control tokens and has every character that could mark them"
                )

    def quote(self, text: str) -> str:
        """Return ``text`` as it goes into the template."""
        return self._control.quote(text, self.mark, keep=self._keep) if self.mark else text

    def ids(self, text: str, **how: object) -> BatchEncoding:
        """Return what the tokenizer makes of the template with the quoted texts; offsets count the
        marks.

        Raises:
            NotText: if a control token is among the ids that the template has not put.
        """
        if not self.mark:
            given: BatchEncoding = self._tokenizer(text, **how)
            return given
        control, backend = self._control, self._tokenizer.backend_tokenizer
        with control.kept_out(backend, mark=self.mark):
            bare = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if control.count_ids(bare) != control.count(text):
                raise NotText(
                    "it spells a control token, which this tokenizer does not keep as text"
                )
            given = self._tokenizer(text, **how)
        return given


# of which Unicode says that text has none
MARKS = [chr(number) for number in range(0xFDD0, 0xFDF0)]
_controls: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[int, ControlTokens]] = (
    WeakKeyDictionary()
)


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> ControlTokens:
    """Return the control tokens of a transformers tokenizer, found once for as long as it gets no
    others.
    """
    size, control = _controls.get(tokenizer, (0, None))
    if control is None or size != len(tokenizer):
        size, control = len(tokenizer), ControlTokens(tokenizer.backend_tokenizer)
        _controls[tokenizer] = size, control
    return control


def _unknown_token(backend: Tokenizer) -> str | None:
    model = backend.model
    if hasattr(model, "unk_token"):
        token: str | None = model.unk_token
        return token
    number = json.loads(backend.to_str())["model"].get("unk_id")  # Unigram's
    return None if number is None else backend.id_to_token(number)
