"""Small models of the five families that every test of first weights and parity goes through."""

from __future__ import annotations

from hfscale.config.schema import Model

VOCAB = 320
_LLAMA_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
_T5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 48, "d_kv": 16}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}

FAMILIES: dict[str, tuple[str, Model]] = {
    "gpt2": ("AutoModelForCausalLM", Model(architecture="gpt2", config=_GPT2)),
    "llama": (
        "AutoModelForCausalLM",
        Model(architecture="llama", config={**_LLAMA_LIKE, "num_key_value_heads": 1}),
    ),
    "bert": ("AutoModelForMaskedLM", Model(architecture="bert", config=_LLAMA_LIKE)),
    "t5": ("AutoModelForSeq2SeqLM", Model(architecture="t5", config=_T5)),
    "bart": ("AutoModelForSeq2SeqLM", Model(architecture="bart", config=_BART)),
}
SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
