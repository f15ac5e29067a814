"""Pretrained models as they are, with nothing to train: masks filled, hidden states, continuations;
the answers of transformers' pipelines.

Shape legend: B texts, T tokens, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import ClassVar

import torch

from hfscale.config.section import Positive, Section
from hfscale.control_tokens import Quoted, text_alone
from hfscale.errors import ConfigError
from hfscale.models.call import call
from hfscale.objectives.base import Batch, Model
from hfscale.stream.examples import BadExample, Examples, Facts
from hfscale.tasks.base import Example, Feature, Output, Task, check_text
from hfscale.tasks.generation import Generation, check_prompt, written
from hfscale.tasks.prompts import prompt_ids
from hfscale.tasks.table import TASKS


class Inference(Task):
    """Texts in, whatever the model gives out."""

    columns: ClassVar = {"text": "a text"}
    scored = False

    @classmethod
    def facts(cls, options: Section, examples: Iterable[Example]) -> Facts:
        """Refuse to be trained."""
        name = next(name for name, place in TASKS.items() if place.endswith(f":{cls.__name__}"))
        raise ConfigError(
            "this task only predicts: there is nothing to learn or score without answers",
            where="task.name",
            value=name,
            remedy="hfscale predict MODEL --task NAME; to train on texts alone, hfscale pretrain",
        )

    def features(self, example: Example) -> list[Feature]:
        """Return the one feature."""
        check_text("text", example["text"])
        return [self.encode(example["text"])]

    def collate(self, rows: Examples) -> Batch:
        """Return the padded texts."""
        return self.batch(rows, inputs=self.inputs(rows), labels=torch.empty(0), counts={})

    def weights(self) -> dict[str, float]:
        """Return nothing."""
        return {}


class FillMaskOptions(Section):
    """How many candidates a mask gets."""

    top_k: Positive = 5


class FillMask(Inference):
    """What most likely stands in place of the tokenizer's mask token; for any architecture of
    ``AutoModelForMaskedLM``.
    """

    Options = FillMaskOptions
    options: FillMaskOptions
    auto_model = "AutoModelForMaskedLM"
    pipeline = "fill-mask"

    def features(self, example: Example) -> list[Feature]:
        """Return the one feature, in which there is a mask."""
        check_text("text", example["text"])
        tokenizer, text = self.setting.tokenizer, example["text"]
        quoted = Quoted(tokenizer, text, keep=tokenizer.mask_token)  # the mask is what is asked
        feature = self.cut(partial(quoted.ids, quoted.quote(text)))
        if tokenizer.mask_token_id not in feature["input_ids"]:
            raise BadExample(f"there is no {tokenizer.mask_token} in the text")
        return [feature]

    def predict(self, model: Model, batch: Batch, rows: Examples) -> list[Output]:
        """Return the candidates, the likeliest first, as the pipeline does: a list; of several
        masks, a list for each.
        """
        tokenizer, mask, outputs = self.setting.tokenizer, self.setting.tokenizer.mask_token_id, []
        for row, logits_TV in zip(rows.features, self.logits(model, batch).float(), strict=True):
            ids = row["input_ids"]
            masks = [at for at, token in enumerate(row["input_ids"]) if token == mask]
            best = logits_TV[masks].softmax(-1).topk(self.options.top_k)
            filled = [
                [
                    {
                        "score": score,
                        "token": token,
                        "token_str": tokenizer.decode([token]),
                        "sequence": tokenizer.decode(
                            [*ids[:at], token, *ids[at + 1 :]], skip_special_tokens=len(masks) == 1
                        ),
                    }
                    for score, token in zip(*scored, strict=True)
                ]
                for at, *scored in zip(
                    masks, best.values.tolist(), best.indices.tolist(), strict=True
                )
            ]
            outputs.append({"prediction": filled[0] if len(masks) == 1 else filled})
        return outputs


class FeatureExtraction(Inference):
    """The last hidden states, (T, H) for each text; for any architecture of ``AutoModel``."""

    auto_model = "AutoModel"
    pipeline = "feature-extraction"

    def predict(self, model: Model, batch: Batch, rows: Examples) -> list[Output]:
        """Return the hidden states of each text's tokens, special ones included."""
        assert batch.lengths_B is not None
        hidden_BTH = call(model, **batch.inputs).last_hidden_state.float()
        return [
            {"prediction": hidden_TH[: len(row["input_ids"])].tolist()}
            for hidden_TH, row in zip(hidden_BTH, rows.features, strict=True)
        ]


class TextGenerationOptions(Section):
    """How texts are gone on with."""

    generation: Generation = Generation()


class TextGeneration(Inference):
    """A text goes on; for any architecture of ``AutoModelForCausalLM``."""

    Options = TextGenerationOptions
    options: TextGenerationOptions
    columns: ClassVar = {"prompt": "the text to go on with"}

    def features(self, example: Example) -> list[Feature]:
        """Return the one feature; an empty prompt starts a document, as the corpus does after every
        document's end.
        """
        tokenizer, prompt = self.setting.tokenizer, example["prompt"]
        if not isinstance(prompt, str):
            raise BadExample(f"the prompt is not text: {prompt!r:.60}")
        start = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )
        with text_alone(tokenizer, prompt):
            ids = prompt_ids(tokenizer, prompt) or [start or 0]
        check_prompt(self, ids, self.options.generation)
        return [{"input_ids": ids}]

    def predict(self, model: Model, batch: Batch, rows: Examples) -> list[Output]:
        """Return the continuation alone."""
        return [
            {"prediction": text}
            for text in written(self, model, rows, options=self.options.generation)
        ]
