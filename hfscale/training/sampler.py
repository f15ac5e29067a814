"""What a model writes while it is trained: continuations, filled masks, denoised spans, answers.

To be looked at: the prompts are the same each time, what is drawn depends on the prompt alone, and
no number of the run depends on it. All ranks ask the model together and get the same, which is what
ZeRO 3 needs; elsewhere the others would only wait.

Shape legend: B samples, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hfscale.config.schema import Samples
from hfscale.control_tokens import text_alone
from hfscale.errors import ConfigError
from hfscale.models.kinds import WRITERS
from hfscale.objectives.base import Objective
from hfscale.objectives.clm import CausalLM
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.objectives.mlm import MaskedLM
from hfscale.objectives.seq2seq import Seq2Seq
from hfscale.stream.examples import Examples, micro_batch
from hfscale.stream.rows import Rows
from hfscale.tasks.base import Task
from hfscale.tasks.generation import Generation, generate
from hfscale.tasks.prompts import prompt_ids

if TYPE_CHECKING:  # a login node checks a run without DeepSpeed
    from hfscale.engine.engine import Engine

SHOWN = 4  # held-out rows or examples, where the config gives no prompts
PROMPT_TOKENS = 32  # at most, of a held-out row that is gone on with


@dataclass(frozen=True)
class Sample:
    """One prompt and what the model made of it."""

    prompt: str
    output: str
    expected: str = ""  # what the held-out text has there, where that is known


class Sampler:
    """Asks a model. ``shown`` are held-out rows, or examples, the same on all ranks."""

    kind: ClassVar[str]

    def __init__(self, objective: Objective, how: Samples, shown: Rows | Examples | None) -> None:
        self.objective, self.how = objective, how
        self.tokenizer = objective.setting.tokenizer
        self._shown = shown

    @property
    def rows(self) -> Rows:
        """Held-out rows."""
        assert isinstance(self._shown, Rows)
        return self._shown

    def write(self, engine: Engine) -> list[Sample]:
        """Return the samples of this moment. All ranks call it, in evaluation mode."""
        raise NotImplementedError

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of ``ids``, with control tokens only if they are asked for."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special))

    def generated(
        self, engine: Engine, prompts: Sequence[list[int]], options: Generation
    ) -> list[list[int]]:
        """Return what follows each prompt, up to the end of a document."""
        ends = [id_ for id_ in (self.tokenizer.eos_token_id,) if id_ is not None]
        pad_id = self.tokenizer.pad_token_id
        if pad_id is None:
            pad_id = ends[0] if ends else 0
        keys = [str(number) for number in range(len(prompts))]
        return generate(engine, prompts, options, keys=keys, pad_id=pad_id, ends=ends)


class Continuations(Sampler):
    """Texts go on: the config's prompts, or the beginnings of held-out rows."""

    kind = "continuations"

    def write(self, engine: Engine) -> list[Sample]:
        """Return them, drawn at the temperature that was asked for."""
        prompts, expected = self._asked()
        temperature = self.how.temperature
        options = Generation(
            max_new_tokens=self.how.new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            truncate=True,
        )
        answers = self.generated(engine, prompts, options)
        rows = zip(prompts, answers, expected, strict=True)
        return [Sample(self.text(ids), self.text(answer), text) for ids, answer, text in rows]

    def _asked(self) -> tuple[list[list[int]], list[str]]:
        """Return the ids of each prompt, and how its text goes on."""
        if self.how.prompts:
            prompts = [self._ids(prompt) for prompt in self.how.prompts]
            return prompts, [""] * len(prompts)
        rows = self.rows.ids_BL[self.rows.valid_B].tolist()
        begin = min(PROMPT_TOKENS, self.objective.setting.seq_len // 2)
        rests = [self.text(row[begin : begin + self.how.new_tokens]) for row in rows]
        return [row[:begin] for row in rows], rests

    def _ids(self, prompt: str) -> list[int]:
        with text_alone(self.tokenizer, prompt):
            return prompt_ids(self.tokenizer, prompt)


class FilledMasks(Sampler):
    """Held-out rows in which tokens are hidden: what the model thinks they were."""

    kind = "filled masks"

    def write(self, engine: Engine) -> list[Sample]:
        """Return them; in the output ``[guess]`` is right, ``[guess|truth]`` is not."""
        batch = self.objective.collate(self.rows).to(engine.device)
        guesses_BT = self.objective.logits(engine, batch).argmax(-1)
        tensors = (batch.inputs["input_ids"], guesses_BT, batch.labels_BT)
        rows = zip(*(tensor.tolist() for tensor in tensors), self.rows.valid_B.tolist())
        return [self._sample(*row) for *row, valid in rows if valid]

    def _sample(self, ids: list[int], guesses: list[int], labels: list[int]) -> Sample:
        written, since = "", 0
        asked = [at for at, label in enumerate(labels) if label != IGNORE_INDEX]
        for at in asked:
            guess, truth = self.text([guesses[at]], special=True), self.text([labels[at]])
            right = guesses[at] == labels[at]
            written += self.text(ids[since:at]) + (f"[{guess}]" if right else f"[{guess}|{truth}]")
            since = at + 1
        expected = [id_ if label == IGNORE_INDEX else label for id_, label in zip(ids, labels)]
        return Sample(
            self.text(ids, special=True), written + self.text(ids[since:]), self.text(expected)
        )


class DenoisedSpans(Sampler):
    """Held-out rows from which spans are missing: what an encoder-decoder puts there."""

    kind = "denoised spans"

    def write(self, engine: Engine) -> list[Sample]:
        """Return them, each token the likeliest."""
        batch = self.objective.collate(self.rows)
        prompts = batch.inputs["input_ids"][self.rows.valid_B].tolist()
        targets = batch.labels_BT[self.rows.valid_B].tolist()
        options = Generation(max_new_tokens=len(targets[0]), do_sample=False, truncate=True)
        answers = self.generated(engine, prompts, options)
        return [
            Sample(*(self.text(ids, special=True) for ids in row))
            for row in zip(prompts, answers, targets, strict=True)
        ]


class Answers(Sampler):
    """The first held-out examples of a task whose answers are texts."""

    kind = "answers"

    def write(self, engine: Engine) -> list[Sample]:
        """Return them, generated as the task's options say."""
        task, rows = self.objective, self._shown
        assert isinstance(task, Task) and isinstance(rows, Examples)
        outputs = task.predict(engine, task.collate(rows).to(engine.device), rows)
        return [
            Sample(
                self.text(row.get("prompt") or row["input_ids"]),
                str(output["prediction"]),
                self.text([label for label in row.get("labels", []) if label != IGNORE_INDEX]),
            )
            for row, output in zip(rows.features, outputs, strict=True)
        ]


BY_OBJECTIVE: dict[type[Objective], type[Sampler]] = {
    CausalLM: Continuations,
    MaskedLM: FilledMasks,
    Seq2Seq: DenoisedSpans,
}


def sampler_class(objective: Objective, how: Samples) -> type[Sampler]:
    """Return what shows the texts of a model that ``objective`` trains.

    Raises:
        ConfigError: if it makes no text, or is not asked by prompts.
    """
    kind = next((kind for of, kind in BY_OBJECTIVE.items() if isinstance(objective, of)), None)
    if isinstance(objective, Task) and objective.auto_model in WRITERS:
        kind = Answers
    if kind is None:
        raise ConfigError(
            "this objective makes no text to show",
            where="metrics.samples",
            value=type(objective).__name__,
            remedy="take it back: metrics.samples=null",
        )
    if how.prompts and kind is not Continuations:
        raise ConfigError(
            f"its samples are {kind.kind} of held-out text, not continuations of prompts",
            where="metrics.samples.prompts",
            value=how.prompts[0],
            remedy="take them back: metrics.samples.prompts=[]",
        )
    return kind


def first_examples(features: Sequence[object]) -> Examples:
    """Return the first of ``features`` (a ``datasets.Dataset``), as ``Sampler`` shows them."""
    numbers = np.arange(min(SHOWN, len(features)))
    return micro_batch(features, numbers, numbers)


def markdown(samples: Sequence[Sample]) -> str:
    """Return ``samples`` as TensorBoard shows them."""
    parts = []
    for number, sample in enumerate(samples, start=1):
        fields = {"prompt": sample.prompt, "model": sample.output, "text": sample.expected}
        parts.append(f"**{number}**")
        parts += [f"{name}\n\n{_block(text)}" for name, text in fields.items() if text]
    return "\n\n".join(parts)


def _block(text: str) -> str:
    """Return ``text`` indented: code of markdown, whatever stands in it."""
    return "\n".join(f"    {line}" for line in text.splitlines())
