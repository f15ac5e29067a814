"""Instruction tuning: a causal model learns to answer in conversations. Only answers are scored;
several examples share a row.

    loss = - sum over tokens of answers of log p(x_t | its conversation up to t)
           / number of tokens of answers

The tokenizer's chat template lays a conversation out, or DEFAULT_TEMPLATE where it has none. What
belongs to an answer is found in the template's own text: from where a prompt for it ends to where
the conversation up to it does. Worked example, two examples in one row (documents apart: a token
sees its own example alone, positions begin at 0 in each):

    input      <|user|> hi <|assistant|> hello </s>  <|user|> 1 + 1 <|assistant|> 2    labels, one
               to the left:
    labels     -        -  hello         </s>  -     -        - - - 2             </s>

Shape legend: B examples, R <= B packed rows, T tokens of a row (the longest example).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hfscale.config.section import Section
from hfscale.metrics.language_model import language_model
from hfscale.metrics.measure import Measure
from hfscale.metrics.rouge import rouge
from hfscale.objectives.base import Batch, Model, Setting
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.stream.examples import BadExample, Examples
from hfscale.tasks.base import Example, Feature, Output, Task, check_text, pad_rows
from hfscale.tasks.chat import Chat
from hfscale.tasks.generation import NEW_TOKENS, Generation, check_prompt, written

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class InstructionOptions(Section):
    """How conversations become tokens, and how answers are generated."""

    chat_template: str | None = (
        None  # Jinja, as transformers has it; None: the tokenizer's, or else DEFAULT_TEMPLATE
    )
    system: str | None = (
        None  # what goes before conversations that do not begin with a system message
    )
    packed: bool = True
    generation: Generation = Generation()


class Instruction(Task):
    """For any architecture of ``AutoModelForCausalLM``; packed, for those that can keep documents
    apart.
    """

    Options = InstructionOptions
    options: InstructionOptions  # type: ignore[assignment]
    causal = True
    frame = ()
    columns: ClassVar = {
        "prompt": "in place of messages: a question",
        "response": "its answer",
        "messages": 'a list of {"role", "content"}, which ends with the answer',
    }
    optional: ClassVar = frozenset({"messages", "prompt", "response"})
    answers: ClassVar = frozenset({"response"})
    metrics: ClassVar = frozenset({"loss", "perplexity", "bits_per_byte"})
    token_loss = True
    term = "answers"  # nats a token of an answer

    def __init__(self, options: Section, setting: Setting) -> None:
        assert isinstance(options, InstructionOptions)
        super().__init__(options, replace(setting, cross_document=not options.packed))
        if setting.tokenizer:  # there is none where predictions are scored
            self.chat = Chat(setting.tokenizer, options.chat_template)

    @classmethod
    def question(cls, example: Example) -> object:
        """Return what the user says first, in either form: conversations that begin alike are in
        one split.
        """
        messages = example.get("messages")
        turns = messages if isinstance(messages, list) else []
        asked = [
            turn.get("content")
            for turn in turns
            if isinstance(turn, dict) and turn.get("role") == "user"
        ]
        first = asked[0] if asked else example.get("prompt") or messages
        return {"prompt": first.strip() if isinstance(first, str) else first}

    # ------------------------------------------------------------------------------------- features
    def features(self, example: Example) -> list[Feature]:
        """Return the one feature: ``input_ids``, ``prompt`` of the last answer; where there are
        answers ``labels`` and the ``bytes`` they are of.
        """
        messages, quoted = self.chat.quoted(self._messages(example))
        answered = messages[-1]["role"] == "assistant"
        before = self.chat.render(messages[:-1] if answered else messages, prompt=True)
        feature = {"prompt": self.chat.ids(quoted, before)["input_ids"]}
        if not answered:
            check_prompt(self, feature["prompt"], self.options.generation)
            return [
                {
                    **feature,
                    "input_ids": feature["prompt"],
                    "truncated": len(feature["prompt"]) > self.setting.seq_len,
                }
            ]
        whole = self.chat.render(messages)
        spans = []  # of the answers: first and last character, and the text
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                first = len(self.chat.render(messages[:n], prompt=True, of=whole))
                last = len(self.chat.render(messages[: n + 1], of=whole))
                spans.append((first, last, message["content"]))
        encoding, longest = self.chat.ids(quoted, whole), self.setting.seq_len
        places = encoding["offset_mapping"]
        labels = []
        for number, (begin, end) in zip(encoding["input_ids"], places, strict=True):
            learnt = any(_is_answer(whole, begin, end, first, last) for first, last, _ in spans)
            labels.append(number if learnt else IGNORE_INDEX)
        read = len(whole)
        if len(labels) > longest:
            read, kept = _cut(places, longest)
            labels[kept:] = [IGNORE_INDEX] * (len(labels) - kept)
        if all(label == IGNORE_INDEX for label in labels):
            raise BadExample(f"no answer within the first {longest} tokens (data.max_length)")
        check_prompt(self, feature["prompt"], self.options.generation)
        return [
            {
                **feature,
                "input_ids": encoding["input_ids"][:longest],
                "labels": labels[:longest],
                "bytes": sum(
                    _scored_bytes(whole, read, span=(first, last), content=answer, mark=quoted.mark)
                    for first, last, answer in spans
                ),
                "truncated": len(labels) > longest,
            }
        ]

    def answered_features(self, example: Example) -> list[Feature]:
        """Return the one feature, if the last message is an answer."""
        (feature,) = self.features(example)
        if "labels" not in feature:
            raise BadExample("the last message is not the assistant's: there is no answer")
        return [feature]

    def _messages(self, example: Example) -> list[dict[str, str]]:
        messages = example.get("messages")
        if messages is None:
            turns = (
                [("user", "prompt"), ("assistant", "response")]
                if example.get("prompt") is not None
                else []
            )
            messages = [
                {"role": role, "content": example[column]}
                for role, column in turns
                if column in example
            ]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            raise BadExample('messages are not a list of {"role", "content"}')
        for message in messages:
            check_text(f"text of the {message['role']}", message["content"])
        if not any(message["role"] == "user" for message in messages):
            raise BadExample("nobody asks anything: there is no message of the user, or no prompt")
        system = (
            [{"role": "system", "content": self.options.system}]
            if self.options.system and messages[0]["role"] != "system"
            else []
        )
        return system + messages

    def collate(self, rows: Examples) -> Batch:  # type: ignore[override]
        """Return the examples packed into R rows as long as the longest; ``document_ids_BT`` (R, T)
        numbers them, B is padding.
        """
        lengths = [len(row["input_ids"]) for row in rows.features]
        packs = pack(lengths) if self.options.packed else [[n] for n in range(len(lengths))]
        shifted = [
            [*row["labels"][1:], IGNORE_INDEX] if "labels" in row else [IGNORE_INDEX] * length
            for row, length in zip(rows.features, lengths, strict=True)
        ]

        def packed(lists: Sequence[list[int]], fill: int) -> Tensor:
            joined = [list(chain.from_iterable(lists[n] for n in pack)) for pack in packs]
            return pad_rows(joined, fill)[0]

        owner_RT = packed([[n] * length for n, length in enumerate(lengths)], len(lengths))
        answers = [sum(label != IGNORE_INDEX for label in labels) for labels in shifted]
        batch = self.batch(
            rows,
            inputs={"input_ids": packed([row["input_ids"] for row in rows.features], self.pad_id)},
            labels=packed(shifted, IGNORE_INDEX),
            counts={"answers": torch.tensor(answers)},
        )
        return replace(batch, document_ids_BT=owner_RT.int())

    # --------------------------------------------------------------------------------- with a model
    def loss(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"answers": sums_B}`` in nats."""
        owner_RT, counts_B = batch.document_ids_BT, batch.counts["answers"]
        assert owner_RT is not None
        # padding belongs to nobody, whose number is behind the last
        asked_B1 = F.pad(counts_B > 0, (0, 1)).to(owner_RT.device)
        owner_RT = owner_RT.long()
        batch = replace(
            batch,
            labels_BT=batch.labels_BT.masked_fill(~asked_B1[owner_RT], IGNORE_INDEX),
            document_ids_BT=batch.document_ids_BT if self.options.packed else None,
        )
        losses_RT = self.scores(model, batch).losses_BT
        sums_B1 = losses_RT.new_zeros(len(asked_B1))
        sums_B1 = sums_B1.index_add(0, owner_RT.flatten(), losses_RT.flatten())
        return {"answers": sums_B1[:-1]}

    def predict(self, model: Model, batch: Batch, rows: Examples) -> list[Output]:
        """Return the last answer a row, ``{"prediction": text}``, and how well the model knows the
        answers that are there, if any.
        """
        ends, strings = self.chat.ends
        options = self.options.generation
        texts = written(self, model, rows, of="prompt", options=options, ends=ends, strings=strings)
        return [
            {"prediction": text, **(known if known["tokens"] else {})}
            for text, known in zip(
                texts, self._known(self.loss(model, batch), batch, rows), strict=True
            )
        ]

    def judge(
        self, model: Model, batch: Batch, rows: Examples
    ) -> tuple[dict[str, Tensor], list[Output]]:
        """Return the loss, and outputs without an answer: to write one for every example takes
        longer than to train on it.
        """
        loss = self.loss(model, batch)
        return loss, self._known(loss, batch, rows)

    def _known(self, loss: dict[str, Tensor], batch: Batch, rows: Examples) -> list[Output]:
        """Return the nats of the answers of each row, and of how many tokens and bytes they are: of
        what was read, if it was cut.
        """
        return [
            {"nats": nats, "tokens": n, "bytes": row.get("bytes", 0)}
            for nats, n, row in zip(
                loss["answers"].tolist(),
                batch.counts["answers"].tolist(),
                rows.features,
                strict=True,
            )
        ]

    def measure(self, predictions: Sequence[Output], references: Sequence[Example]) -> Measure:
        """Return ``loss``, ``perplexity`` and ``bits_per_byte`` of the answers; ROUGE of the
        generated ones, where they were.
        """
        nats, tokens, bytes_ = (
            [prediction[key] for prediction in predictions] for key in ("nats", "tokens", "bytes")
        )
        known = language_model(nats, tokens, bytes_)
        if not all("prediction" in p for p in predictions):
            return known
        answers = [self._messages(reference)[-1]["content"] for reference in references]
        return known | rouge([p["prediction"].strip() for p in predictions], answers)

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Carry along the chat template and how to generate."""
        self.options.generation.carry(
            model, ends=self.chat.ends[0], limit=NEW_TOKENS, pad_id=self.pad_id
        )
        tokenizer.chat_template = self.chat.template


def _is_answer(whole: str, begin: int, end: int, first: int, last: int) -> bool:
    """Return whether a token is of the answer ``first .. last``: a word may hold the white space
    that the prompt ends in.
    """
    return first < end <= last and begin < end and (first <= begin or whole[begin:first].isspace())


def _cut(places: Sequence[tuple[int, int]], longest: int) -> tuple[int, int]:
    """Return how many characters, and tokens, are read of a text that is cut after ``longest``
    tokens: none of half a character.
    """
    kept = longest
    while kept and places[kept - 1][1] > places[longest][0]:
        kept -= 1  # a token of bytes, with the rest of its character behind the cut
    return (places[kept - 1][1] if kept else 0), kept


def _scored_bytes(whole: str, read: int, *, span: tuple[int, int], content: str, mark: str) -> int:
    """Return how many bytes of an answer are among the first ``read`` characters.

    What the template puts behind it is no text of it, nor is the ``mark`` in what spells a control
    token.
    """
    first, last = span
    for words in (content, content.strip()):  # templates strip
        if (at := whole.find(words, first, last)) >= 0:
            first, last = at, at + len(words)
            break
    text = whole[first : min(last, read)]
    return len((text.replace(mark, "") if mark else text).encode())


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Return rows, each a list of numbers of examples in order, none longer than the longest
    example: first fit, the longest first.
    """
    room = max(lengths)
    packs: list[tuple[int, list[int]]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        at = next((k for k, (used, _) in enumerate(packs) if used + lengths[n] <= room), len(packs))
        used, members = packs[at] if at < len(packs) else (0, [])
        packs[at : at + 1] = [(used + lengths[n], [*members, n])]
    return [sorted(members) for _, members in packs]
