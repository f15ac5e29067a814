"""A chat template: conversations as text, and where an answer in it ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

from hfscale.control_tokens import Quoted
from hfscale.deadline import TookTooLong, deadline
from hfscale.errors import DataError
from hfscale.stream.examples import BadExample, Cell
from hfscale.tasks.generation import say_once
from hfscale.tokenizer import end_of_document_id

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerFast

RENDER_S = 10.0  # for a conversation; a template takes a millisecond
SIGN = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>|\[/?INST\]|<<SYS>>")
DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{{ ('' if loop.first else '\\n') + '<|' + message['role'] + '|>\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ END }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"""


Message = dict[str, str]  # "role", "content", and what else a template reads
MARK = "an-answer"  # stands for one, where a template is asked how it ends


class Chat:
    """A tokenizer with a template: ``template``, or its own, or else DEFAULT_TEMPLATE."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
        self._tokenizer = tokenizer
        self.template = template or tokenizer.chat_template
        if not self.template:
            end = tokenizer.convert_ids_to_tokens(end_of_document_id(tokenizer))
            self.template = DEFAULT_TEMPLATE.replace("END", repr(end))

    def render(
        self, messages: list[Message], *, prompt: bool = False, of: str | None = None
    ) -> str:
        """Return the text of a conversation, with ``prompt`` up to where its answer begins; ``of``
        the text of all of it, of which this is to be the beginning.

        Raises:
            BadExample: where the template refuses it, or writes it otherwise than in ``of``.
            DataError: for a template that is not done in time.
        """
        try:
            with deadline(RENDER_S):
                text = str(
                    self._tokenizer.apply_chat_template(
                        messages,
                        chat_template=self.template,
                        tokenize=False,
                        add_generation_prompt=prompt,
                    )
                )
        except (TookTooLong, MemoryError):
            raise DataError(
                f"the chat template is not done after {RENDER_S:.0f} s, or takes all memory",
                where="task.options.chat_template, or that of the tokenizer",
                value=str(self.template)[:80],
                remedy="mend its loops",
            ) from None
        except Exception as error:  # whatever a template says against roles or their order
            raise BadExample(f"the chat template refuses the conversation: {error}") from error
        if of is not None and not of.startswith(text):
            raise BadExample(
                "the chat template writes an answer differently once the conversation goes on; "
                "give it one answer an example"
            )
        return text

    def quoted(self, messages: list[Message]) -> tuple[list[Message], Quoted]:
        """Return the messages as they go into the template: control tokens that they spell are
        marked, so that none is made of them.
        """
        quoted = Quoted(self._tokenizer, *_texts(messages))
        texts = [*_texts(messages)]
        signs = {sign for text in texts for sign in SIGN.findall(text)}
        added = self._tokenizer.added_tokens_decoder.values()  # special or not
        signs |= {token.content for token in added if any(token.content in text for text in texts)}
        if signs := {sign for sign in signs if quoted.quote(sign) == sign}:  # no special tokens
            bare = [{**message, "content": "x"} for message in messages]
            skeleton = self.render(bare) + self.render(bare[:1], prompt=True)
            if forged := [sign for sign in sorted(signs) if sign in skeleton]:
                raise BadExample(
                    f"it spells {forged[0]}, with which the chat template parts the turns"
                )
        if not quoted.mark:
            return messages, quoted
        marked = _each_text(messages, quoted.quote)
        if self.render(marked).replace(quoted.mark, "") != self.render(messages):
            raise BadExample(
                "it spells control tokens, and the chat template writes the conversation "
                "otherwise when they are kept apart"
            )
        return marked, quoted

    def ids(self, quoted: Quoted, text: str) -> BatchEncoding:
        """Return the ids of what was rendered of ``quoted`` messages, and where each lies."""
        return quoted.ids(text, add_special_tokens=False, return_offsets_mapping=True)

    @cached_property
    def ends(self) -> tuple[list[int], list[str]]:
        """With what the template ends an answer: ids of tokens, or where there is no such token
        texts.
        """
        whole, answer = "", {"role": "assistant", "content": MARK}
        for roles in (["user"], ["system", "user"]):  # some templates want more than a question
            with suppress(BadExample):
                whole = self.render([*({"role": r, "content": r} for r in roles), answer])
        after = whole.rpartition(MARK)[2]
        tokenizer = self._tokenizer
        special = tokenizer.added_tokens_decoder.keys() - {tokenizer.unk_token_id}
        ids = [
            id_
            for id_ in Quoted(tokenizer).ids(after, add_special_tokens=False)["input_ids"]
            if id_ in special
        ][:1]
        if ids:
            return ids, []
        text = after.strip() if MARK in whole else ""
        say_once(
            "the chat template ends an answer with no token of its own: "
            + (f"answers are cut at {text!r}" if text else "they go on until the model's own end")
        )
        return [], [text] if text else []


def _texts(value: object) -> Iterator[str]:
    """Yield every text in messages, roles and all."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _each_text(value: Cell, change: Callable[[str], str]) -> Cell:
    """Return ``value`` with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_text(part, change) for key, part in value.items()}
    return [_each_text(part, change) for part in value] if isinstance(value, list) else value
