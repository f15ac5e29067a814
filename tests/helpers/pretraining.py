"""Every way to pretrain, small: an objective and a model of a family, without dropout, and what
they ask of the tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfscale.tokenizer import extended
from tests.helpers.corpus import GPT2, LLAMA, run_values
from tests.models.families import FAMILIES

_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2_OFF = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
TOKENS = {"mask_token": "<mask>", "cls_token": "<s>", "pad_token": "<pad>"}

# name -> (objective, architecture, its config, learning rate). T5's ReLU has a kink: at 1e-2 a unit
# within rounding of 0 was once on for one cut and off for another, which moved a gradient norm by
# 7e-4 and a loss by 8e-5; never with the gated GELU.
PRETRAINING: dict[str, tuple[dict[str, Any], str, dict[str, Any], float]] = {
    "gpt2": ({"name": "clm"}, "gpt2", {**GPT2["config"], **_GPT2_OFF}, 1e-2),
    "llama": ({"name": "clm"}, "llama", {**LLAMA["config"]}, 1e-2),
    "mixtral": ({"name": "clm"}, "mixtral", {**LLAMA["config"], **_EXPERTS}, 1e-2),
    "bert": ({"name": "mlm", "options": {"units": "word"}}, "bert", {**_BERT, **_OFF}, 1e-2),
    "roberta": (
        {"name": "mlm"},
        "roberta",
        {**_BERT, **_OFF, "max_position_embeddings": 600},
        1e-2,
    ),
    "modernbert": ({"name": "mlm", "options": {"units": "span"}}, "modernbert", _BERT, 1e-2),
    "t5": ({"name": "seq2seq"}, "t5", {**FAMILIES["t5"][1].config, "dropout_rate": 0.0}, 3e-3),
    "bart": (
        {"name": "seq2seq", "options": {"noise": "bart"}},
        "bart",
        {**FAMILIES["bart"][1].config, "dropout": 0.0},
        3e-3,
    ),
    "contrastive": ({"name": "contrastive"}, "bert", {**_BERT, **_OFF}, 1e-3),
    "contrastive_mlm": (
        {"name": "contrastive", "options": {"mlm_weight": 0.1, "pooling": "cls"}},
        "bert",
        {**_BERT, **_OFF},
        1e-3,
    ),
}


def extended_tokenizer(corpus: Path, folder: Path) -> Path:
    """Return ``folder``, with the corpus' tokenizer and all the special tokens that an objective
    may need.
    """
    if not folder.exists():
        extended(corpus / "tokenizer", roles=TOKENS, sentinels=20).save_pretrained(folder)
    return folder


def pretraining(corpus: Path, root: Path, name: str, kind: str, **sections: Any) -> dict[str, Any]:
    """Return the values of the config of a small run ``name`` of the given kind."""
    objective, architecture, config, lr = PRETRAINING[kind]
    sections["optim"] = {"lr": lr, **sections.get("optim", {})}
    return run_values(
        corpus,
        root,
        name,
        **{
            "tokenizer": {"path": str(extended_tokenizer(corpus, root / "tokenizer"))},
            "objective": objective,
            "model": {"architecture": architecture, "config": config},
            **sections,
        },
    )
