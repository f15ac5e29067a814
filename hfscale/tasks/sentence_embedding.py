"""The pipeline that transformers has not: a text in, its vector of length 1 out, pooled as in
training.

A copy of this file goes along with exports, so it knows transformers alone:
``pipeline("sentence-embedding", FOLDER, trust_remote_code=True)``.
Shape legend: B texts, T tokens, H width.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Pipeline, PreTrainedModel

# what a stage of a pipeline hands to the next
Handed = dict[str, Any]


class SentenceEmbeddingPipeline(Pipeline):
    """``model.config.pooling`` says how: the state of the first token, of the last one, or the mean
    of all.
    """

    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = True  # type: ignore[assignment]
    model: PreTrainedModel

    def _sanitize_parameters(
        self, **_: object
    ) -> tuple[dict[str, object], dict[str, object], dict[str, object]]:
        return {}, {}, {}

    def preprocess(self, input_: str, **_: object) -> Handed:
        assert self.tokenizer is not None
        encoding = self.tokenizer(
            input_,
            truncation=True,
            return_tensors="pt",
            split_special_tokens=True,  # text that spells a control token is text
        )
        return {name: encoding[name] for name in ("input_ids", "attention_mask")}

    def _forward(self, input_tensors: Handed, **_: object) -> Any:
        hidden_BTH = self.model(**input_tensors).last_hidden_state.float()
        mask_BT = input_tensors["attention_mask"]
        if self.model.config.pooling == "mean":
            mask_BT1 = mask_BT.unsqueeze(-1).float()
            pooled_BH = (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)
        else:
            # the first that is as large
            at_B = (mask_BT if self.model.config.pooling == "cls" else mask_BT.cumsum(1)).argmax(1)
            pooled_BH = hidden_BTH[range(len(hidden_BTH)), at_B]
        return {"vector": torch.nn.functional.normalize(pooled_BH, dim=-1)}

    def postprocess(self, model_outputs: Handed, **_: object) -> list[float]:
        vector: list[float] = model_outputs["vector"][0].tolist()
        return vector
