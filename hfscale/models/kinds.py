"""What an architecture is for, by transformers' own tables, and what such models are called: by
transformers, by peft, by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Purpose:
    """What models with one kind of head are for."""

    auto_model: str  # the class of transformers that opens them
    table: str  # of ``transformers.models.auto.modeling_auto``: the architectures
    task: str | None = None  # that predicts with such a model as it is
    objective: str | None = None  # that pretrains one
    peft: str | None = None  # by which peft's and transformers' Auto classes find an adapter


CAUSAL = Purpose(
    "AutoModelForCausalLM",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    task="text_generation",
    objective="clm",
    peft="CAUSAL_LM",
)
MASKED = Purpose(
    "AutoModelForMaskedLM",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    task="fill_mask",
    objective="mlm",
)
SEQ2SEQ = Purpose(
    "AutoModelForSeq2SeqLM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    objective="seq2seq",
    peft="SEQ_2_SEQ_LM",
)
ENCODER = Purpose(
    "AutoModel",
    "MODEL_MAPPING_NAMES",
    task="feature_extraction",
    peft="FEATURE_EXTRACTION",
)
# an architecture in several tables is for the last of them: BART's is in that of masks too, and
# XLM's in that of causal models, which it is with ``causal`` in its config alone
PURPOSES = (
    CAUSAL,
    MASKED,
    SEQ2SEQ,
    Purpose(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        task="sequence_classification",
        peft="SEQ_CLS",
    ),
    Purpose(
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        task="token_classification",
        peft="TOKEN_CLS",
    ),
    Purpose(
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        task="extractive_qa",
        peft="QUESTION_ANS",
    ),
    ENCODER,
)
BY_CLASS = {one.auto_model: one for one in PURPOSES}
WRITERS = (CAUSAL.auto_model, SEQ2SEQ.auto_model)  # whose models generate()


def architecture(config: PretrainedConfig) -> str:
    """Return the class that a config says it is of; nothing, where it does not say."""
    return (config.architectures or [""])[0]


def purpose_of(config: PretrainedConfig) -> Purpose | None:
    """Return what a model of ``config`` is for, by the name of its class; None: not for text alone,
    or of a class that transformers does not know.
    """
    name = architecture(config)
    known = (one for one in reversed(PURPOSES) if name in _names(one) and _of_text(one, config))
    return next(known, None)


def _of_text(one: Purpose, config: PretrainedConfig) -> bool:
    """Return whether a model of a table is one of text: some hold models of sound and pictures too,
    whose config has a part for text, and of its own no vocabulary.
    """
    if one is ENCODER:
        return config.model_type in _table(MASKED) and not config.is_encoder_decoder
    return one not in (CAUSAL, MASKED, SEQ2SEQ) or hasattr(config, "vocab_size")


def _table(one: Purpose) -> Mapping[str, str | tuple[str, ...]]:
    module = import_module("transformers.models.auto.modeling_auto")
    table: Mapping[str, str | tuple[str, ...]] = getattr(module, one.table)
    return table


@cache
def _names(one: Purpose) -> frozenset[str]:
    """Return the architectures of a purpose: its table has one for a model type, or several."""
    entries = _table(one).values()
    return frozenset(chain(*([entry] if isinstance(entry, str) else entry for entry in entries)))
