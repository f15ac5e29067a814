"""The pipeline that transformers 5 dropped: a text in, the text that an encoder-decoder makes of it
out.

A copy of this file goes along with exports, so it knows transformers alone:
``pipeline("translation", FOLDER, trust_remote_code=True)``.
"""

from __future__ import annotations

from typing import Any

from transformers import Pipeline

# what a stage of a pipeline hands to the next
Handed = dict[str, Any]
KEYS = {"translation": "translation_text", "summarization": "summary_text"}  # as in transformers 4


class TextToTextPipeline(Pipeline):
    """Generates as the folder's generation_config.json says, unless a call says otherwise:
    ``num_beams=4``, ...
    """

    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = True  # type: ignore[assignment]
    model: Any  # the base class knows none that generates

    def __call__(self, inputs: object, *args: object, **options: object) -> object:
        """Return ``[{"translation_text": text}]``: one for a text, and one for each of a list of
        texts.
        """
        outputs = super().__call__(inputs, *args, **options)  # type: ignore[no-untyped-call]
        return [answers[0] for answers in outputs] if isinstance(inputs, list) else outputs

    def _sanitize_parameters(
        self, **generation: object
    ) -> tuple[dict[str, object], dict[str, object], dict[str, object]]:
        return {}, generation, {}

    def preprocess(self, input_: str, **_: object) -> Handed:
        assert self.tokenizer is not None
        prefix = getattr(self.model.config, "prefix", None) or ""
        encoding = self.tokenizer(
            prefix + input_,
            truncation=True,
            return_tensors="pt",
            split_special_tokens=not prefix,  # text is text; a prefix may put control tokens
        )
        return {name: encoding[name] for name in ("input_ids", "attention_mask")}

    def _forward(self, input_tensors: Handed, **generation: object) -> Any:
        return {"ids": self.model.generate(**input_tensors, **generation)}

    def postprocess(self, model_outputs: Handed, **_: object) -> list[dict[str, str]]:
        assert self.tokenizer is not None
        texts = self.tokenizer.batch_decode(model_outputs["ids"], skip_special_tokens=True)
        return [{KEYS.get(self.task, "generated_text"): text} for text in texts]
