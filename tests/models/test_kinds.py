"""What architectures are for, read off transformers' tables by hand."""

from __future__ import annotations

import pytest
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from hfscale.models.kinds import PURPOSES, purpose_of
from hfscale.tasks.table import TASKS

OF_TEXT = {
    "AutoModelForCausalLM": [
        *("gpt2 GPT2LMHeadModel", "llama LlamaForCausalLM", "mixtral MixtralForCausalLM"),
        *("bert BertLMHeadModel", "bert-generation BertGenerationDecoder"),
        *("reformer ReformerModelWithLMHead", "xlnet XLNetLMHeadModel", "mamba MambaForCausalLM"),
        *("openai-gpt OpenAIGPTLMHeadModel", "ctrl CTRLLMHeadModel", "bart BartForCausalLM"),
        *("gemma3_text Gemma3ForCausalLM", "bloom BloomForCausalLM", "rwkv RwkvForCausalLM"),
    ],
    "AutoModelForMaskedLM": [
        *("bert BertForMaskedLM", "roberta RobertaForMaskedLM", "modernbert ModernBertForMaskedLM"),
        *("flaubert FlaubertWithLMHeadModel", "xlm XLMWithLMHeadModel"),
        *("xlm-roberta XLMRobertaForMaskedLM", "electra ElectraForMaskedLM"),
    ],
    "AutoModelForSeq2SeqLM": [
        *("t5 T5ForConditionalGeneration", "mt5 MT5ForConditionalGeneration"),
        *("marian MarianMTModel", "bart BartForConditionalGeneration"),
        *("m2m_100 M2M100ForConditionalGeneration", "led LEDForConditionalGeneration"),
        *("seamless_m4t SeamlessM4TForTextToText", "fsmt FSMTForConditionalGeneration"),
        *("mbart MBartForConditionalGeneration", "t5gemma2 T5Gemma2ForConditionalGeneration"),
    ],
    "AutoModelForSequenceClassification": [
        *("bert BertForSequenceClassification", "gpt2 GPT2ForSequenceClassification"),
        "bart BartForSequenceClassification",
    ],
    "AutoModelForTokenClassification": ["distilbert DistilBertForTokenClassification"],
    "AutoModelForQuestionAnswering": [
        *("bert BertForQuestionAnswering", "xlnet XLNetForQuestionAnsweringSimple"),
    ],
    "AutoModel": ["bert BertModel", "modernbert ModernBertModel", "mpnet MPNetModel"],
}
OF_NO_TEXT = [
    *("whisper WhisperForConditionalGeneration", "mistral3 Mistral3ForConditionalGeneration"),
    # in the table of causal models too, but its text is a part beside the pictures
    "gemma3 Gemma3ForConditionalGeneration",
    *("qwen2_audio Qwen2AudioForConditionalGeneration", "vit ViTModel"),
    *("llava LlavaForConditionalGeneration", "wav2vec2 Wav2Vec2ForSequenceClassification"),
    *("vilt ViltForQuestionAnswering", "blip-2 Blip2ForConditionalGeneration"),
    # texts, but these classes are none that one of transformers' Auto classes gives back
    *("bert BertForPreTraining", "xlnet XLNetForQuestionAnswering", "bert OfAStranger"),
]


def config_of(case: str) -> PretrainedConfig:
    model_type, architecture = case.split()
    config = CONFIG_MAPPING[model_type]()
    config.architectures = [architecture]
    return config


@pytest.mark.parametrize(
    ("case", "wanted"),
    [(case, wanted) for wanted, cases in OF_TEXT.items() for case in cases]
    + [(case, None) for case in OF_NO_TEXT],
)
def test_what_an_architecture_is_for(case: str, wanted: str | None) -> None:
    purpose = purpose_of(config_of(case))
    assert (purpose and purpose.auto_model) == wanted


def test_a_config_that_says_nothing_is_for_nothing() -> None:
    assert purpose_of(PretrainedConfig()) is None


def test_all_that_a_purpose_names_is_there() -> None:
    for one in PURPOSES:
        assert hasattr(transformers, one.auto_model)
        assert one.task is None or one.task in TASKS
