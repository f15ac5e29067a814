"""Text to text: translation and summarization, by an encoder-decoder or by a causal model with a
prompt.

    loss = - sum over target tokens of log p(y_t | y_1 .. y_{t-1}, source)
           / number of target tokens, the end token among them

With label smoothing e the target is (1 - e) y_t + e / V, in training alone. Worked example,
``prompt: "{source} =>"``:

    encoder-decoder   in   prefix a b c </s>            decoder in  <start> x y     labels  x y </s>
    causal            in   a b c => x y                 labels      - - - x y </s>

Shape legend: B examples, S source tokens, U target tokens, T of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hfscale.config.section import Positive, Section
from hfscale.control_tokens import Quoted, text_alone
from hfscale.errors import ConfigError
from hfscale.metrics.measure import Measure
from hfscale.metrics.rouge import rouge
from hfscale.metrics.translation import translation
from hfscale.objectives.base import Batch, Model, Setting
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.stream.examples import BadExample, Examples
from hfscale.tasks.base import Example, Feature, Output, Task, check_text, pad_rows
from hfscale.tasks.generation import Generation, written
from hfscale.tasks.prompts import decoder_start, prompt_ids
from hfscale.tokenizer import end_of_document_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextToTextOptions(Section):
    """What the model is given and asked for."""

    prompt: Annotated[str, Field(pattern=r"\{source\}")] | None = (
        None  # causal models: what they go on from. None: an encoder-decoder
    )
    prefix: str = ""  # encoder-decoders such as T5: before every source
    source_language: str | None = None  # a code of a multilingual tokenizer (mBART, NLLB)
    target_language: str | None = None
    max_target_length: Positive | None = (
        None  # in tokens; default: max_length, of a causal model half of it
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    generation: Generation = Generation()


class TextToText(Task):
    """Any architecture of ``AutoModelForSeq2SeqLM``; with a prompt, of ``AutoModelForCausalLM``."""

    Options = TextToTextOptions
    options: TextToTextOptions
    columns: ClassVar = {"source": "a text", "target": "the text that it becomes"}
    answers: ClassVar = frozenset({"target"})
    token_loss = True
    term = "text"  # nats a target token

    def __init__(self, options: Section, setting: Setting) -> None:
        super().__init__(options, setting)
        assert isinstance(options, TextToTextOptions)
        longest = setting.seq_len
        self._causal = options.prompt is not None
        self.auto_model = "AutoModelForCausalLM" if self._causal else "AutoModelForSeq2SeqLM"
        if self._causal:
            self.pipeline = "text-generation"  # type: ignore[misc]
        else:
            self.code = "hfscale.tasks.text2text"
        self._target_length = options.max_target_length or (
            longest // 2 if self._causal else longest
        )
        if self._target_length > longest - self._causal:
            raise ConfigError(
                "targets may be longer than there is room",
                where="task.options.max_target_length",
                value=self._target_length,
                remedy=f"raise data.max_length, which is {longest}"
                + " for prompt and target" * self._causal,
            )
        if setting.tokenizer is None:  # predictions are scored
            return
        self._start: int | None = None  # of the decoder; None: the model's
        self._end = end_of_document_id(setting.tokenizer)
        if self._causal:  # a prompt ends with no mark: it goes on
            begins = prompt_ids(setting.tokenizer, "a")[:1] == [setting.tokenizer.bos_token_id]
            self.frame = ("bos_token", None) if begins else ()
        # what only a user says; where nobody does, the model's own setting, or else the longest
        # target
        self._said: dict[str, int] = (
            {"max_new_tokens": self._target_length} if options.max_target_length else {}
        )
        for side, code in (
            ("src_lang", options.source_language),
            ("tgt_lang", options.target_language),
        ):
            if code is not None:
                self._set_language(side, code)

    def _set_language(self, side: str, code: str) -> None:
        tokenizer = self.setting.tokenizer
        number = tokenizer.convert_tokens_to_ids(code)
        if not hasattr(tokenizer, side) or number in (None, tokenizer.unk_token_id):
            raise ConfigError(
                "this tokenizer has no such language",
                where="task.options",
                value=code,
                remedy="give a code that stands in its vocabulary (mBART: en_XX, NLLB: "
                "eng_Latn), or leave it out",
            )
        setattr(tokenizer, side, code)
        if side == "tgt_lang" and tokenizer(text_target="a")["input_ids"][0] == number:
            self._said["forced_bos_token_id"] = number
        elif side == "tgt_lang":  # mBART-25 has it behind the text, and begins with it
            self._start = self._said["decoder_start_token_id"] = number

    # ------------------------------------------------------------------------------------- features
    def features(self, example: Example) -> list[Feature]:
        """Return the one feature: ``input_ids`` of source or prompt, and the target's ids as
        ``labels``.
        """
        for role in self.columns:
            if role in example:
                check_text(role, example[role])
        feature = (
            self._prompt(example["source"]) if self._causal else self._prefixed(example["source"])
        )
        feature = {"input_ids": feature["input_ids"], "truncated": feature["truncated"]}
        if "target" in example:
            with text_alone(self.setting.tokenizer, example["target"]):
                ids = self.setting.tokenizer(
                    text_target=example["target"], add_special_tokens=not self._causal
                )["input_ids"]
            # an end, or an end and a language
            tail = ids[-2:].index(self._end) - 2 if self._end in ids[-2:] else 0
            text, end = (ids[:tail], ids[tail:]) if tail else (ids, [self._end])
            room = self._target_length - len(end)
            feature |= {
                "labels": text[:room] + end,
                "truncated": feature["truncated"] or len(text) > room,
            }
        return [feature]

    def _prefixed(self, source: str) -> Feature:
        """Return the source behind the prefix, which alone may put control tokens."""
        quoted = Quoted(self.setting.tokenizer, source)
        return self.cut(partial(quoted.ids, self.options.prefix + quoted.quote(source)))

    def _prompt(self, source: str) -> Feature:
        """Return the prompt; a source that is too long loses its end, the words around it stay."""
        tokenizer, limit = self.setting.tokenizer, self.setting.seq_len - self._target_length
        whole, quoted = source, Quoted(tokenizer, source)

        def ids_of(source: str) -> list[int]:
            prompt = str(self.options.prompt).replace("{source}", quoted.quote(source))
            return prompt_ids(tokenizer, prompt, encode=quoted.ids)

        while len(ids := ids_of(source)) > limit:
            with text_alone(tokenizer, source):
                offsets = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)[
                    "offset_mapping"
                ]
            if (kept := len(offsets) + limit - len(ids)) <= 0:
                raise BadExample(
                    f"the prompt alone has more than {limit} tokens (data.max_length - "
                    "max_target_length)"
                )
            source = source[: offsets[kept][0]]
        return {"input_ids": ids, "truncated": source != whole}

    def collate(self, rows: Examples) -> Batch:
        """Return encoder inputs (B, S), decoder inputs and labels (B, U); of a causal model, inputs
        and labels (B, T).
        """
        sources, targets = (
            [list(row.get(name, [])) for row in rows.features] for name in ("input_ids", "labels")
        )
        if self._causal:
            labels_BU, _ = pad_rows(
                [[IGNORE_INDEX] * (len(s) - 1) + t for s, t in zip(sources, targets, strict=True)],
                IGNORE_INDEX,
            )
            sources = [s + t[:-1] for s, t in zip(sources, targets, strict=True)]
        else:
            labels_BU, _ = pad_rows([target or [IGNORE_INDEX] for target in targets], IGNORE_INDEX)
        ids_BS, mask_BS = pad_rows(sources, self.pad_id)
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS}
        if not self._causal:
            decoder_BU = labels_BU.roll(1, 1).masked_fill_(
                labels_BU.roll(1, 1) == IGNORE_INDEX, self.pad_id
            )
            decoder_BU[:, 0] = (
                decoder_start(self.setting.model_config, self.pad_id)
                if self._start is None
                else self._start
            )
            inputs["decoder_input_ids"] = decoder_BU
        return self.batch(
            rows,
            inputs=inputs,
            labels=labels_BU,
            counts={"text": (labels_BU != IGNORE_INDEX).sum(1)},
        )

    # --------------------------------------------------------------------------------- with a model
    def loss(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"text": sums_B}`` in nats; smoothed while training."""
        smoothing = self.options.label_smoothing if torch.is_grad_enabled() else 0.0
        filler_B = (batch.counts["text"] == 0).to(batch.labels_BT.device)
        labels_BU = batch.labels_BT.masked_fill(filler_B[:, None], IGNORE_INDEX)
        scores = self.scores(model, replace(batch, labels_BT=labels_BU), smoothing=smoothing)
        return {"text": scores.losses_BT.sum(1)}

    def predict(self, model: Model, batch: Batch, rows: Examples) -> list[Output]:
        """Return ``{"prediction": text}`` a row."""
        return [
            {"prediction": text}
            for text in written(
                self,
                model,
                rows,
                options=self.options.generation,
                ends=[self._end],
                limit=self._target_length,
                settings=self._said,
            )
        ]

    def judge(
        self, model: Model, batch: Batch, rows: Examples
    ) -> tuple[dict[str, Tensor], list[Output]]:
        """Return both."""
        return self.loss(model, batch), self.predict(model, batch, rows)

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Carry along how to generate, the prefix or the prompt (as a chat template), and the
        pipeline that transformers 5 dropped.
        """
        self.options.generation.carry(
            model,
            ends=[self._end],
            limit=self._target_length,
            pad_id=self.pad_id,
            settings=self._said,
        )
        tokenizer.model_max_length = self.setting.seq_len
        if self._causal:
            before, after = str(self.options.prompt).split("{source}", 1)
            bos = tokenizer.bos_token if self.frame else ""
            tokenizer.chat_template = (
                f"{{{{ {bos + before!r} + messages[-1]['content'] + {after!r} }}}}"
            )
            return
        if model.generation_config.decoder_start_token_id is None:
            model.generation_config.decoder_start_token_id = decoder_start(
                model.config, self.pad_id
            )
        model.config.prefix = self.options.prefix
        model.config.custom_pipelines = {
            self.pipeline: {"impl": "text2text.TextToTextPipeline", "pt": ["AutoModelForSeq2SeqLM"]}
        }


class Translation(TextToText):
    """A text in another language; scored with sacreBLEU."""

    pipeline = "translation"
    metrics: ClassVar = frozenset({"bleu", "chrf"})

    def measure(self, predictions: Sequence[Output], references: Sequence[Example]) -> Measure:
        """Return ``bleu`` and ``chrf``."""
        return translation(
            [p["prediction"].strip() for p in predictions], [r["target"] for r in references]
        )


class Summarization(TextToText):
    """A shorter text; scored with ROUGE."""

    pipeline = "summarization"
    metrics: ClassVar = frozenset({"rouge1", "rouge2", "rougeL", "rougeLsum"})

    def measure(self, predictions: Sequence[Output], references: Sequence[Example]) -> Measure:
        """Return ``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum``."""
        return rouge(
            [p["prediction"].strip() for p in predictions], [r["target"] for r in references]
        )
