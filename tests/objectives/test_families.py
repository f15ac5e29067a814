"""Which architectures each objective takes, from config alone: the first loss is the theory's, and
the wrong kind is refused.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hfscale.config.schema import Model, Named
from hfscale.errors import ConfigError
from hfscale.models.build import build_model, special_ids
from hfscale.objectives.base import Objective, Setting, load_objective
from tests.models.families import FAMILIES
from tests.objectives.rows import make_rows
from tests.objectives.tokenizers import tokenizer

T = 48
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 1}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "mlm": {
        "bert": SMALL,
        "roberta": SMALL,
        "modernbert": SMALL,
        "deberta": SMALL,
        "deberta-v2": SMALL,
        "electra": SMALL,
        "distilbert": {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
        },
    },
    "clm": {
        "gpt2": FAMILIES["gpt2"][1].config,
        "llama": GROUPED,
        "qwen2": GROUPED,
        "qwen3": {**GROUPED, "head_dim": 16},
        "mistral": {**GROUPED, "head_dim": 16},
        "gpt_neox": SMALL,
        "opt": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
    },
    "seq2seq": {"t5": FAMILIES["t5"][1].config, "bart": FAMILIES["bart"][1].config},
}
CASES = [
    (objective, architecture) for objective, models in MODELS.items() for architecture in models
]
NO_ISOLATION = {"deberta", "deberta-v2"}


def parts(name: str, architecture: str, **setting: Any) -> tuple[Objective, torch.nn.Module]:
    """Return the objective ``name`` and its model of ``architecture``, in evaluation mode."""
    kind = tokenizer()
    options = {"noise": "bart"} if architecture == "bart" else {}
    bare = load_objective(Named(name=name, options=options), Setting(seq_len=T, tokenizer=kind))
    config = next(
        (models[architecture] for models in MODELS.values() if architecture in models), {}
    ) | setting.pop("config", {})
    attention = "eager" if architecture in NO_ISOLATION else "sdpa"
    section = Model(architecture=architecture, config=config, attention=attention)
    model = build_model(
        section,
        auto_model=bare.auto_model,
        vocab_size=len(kind),
        seq_len=T,
        seed=5,
        overrides=special_ids(kind),
    ).eval()
    setting = {
        "seq_len": T,
        "micro_batch": 2,
        "tokenizer": kind,
        "model_config": model.config,
        **setting,
    }
    return load_objective(Named(name=name, options=options), Setting(**setting)), model


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_the_first_loss_is_the_theorys(name: str, architecture: str) -> None:
    objective, model = parts(name, architecture)
    with torch.no_grad():
        objective.check(model, device="cpu")
        batch = objective.collate(make_rows([[20, 29], [49]], vocab=300))
        sums = objective.loss(model, batch)
    first = (sums[name].sum() / batch.counts[name].sum()).item()
    # T5's logits vary by 1: + 1/2
    assert first == pytest.approx(
        math.log(len(tokenizer())), abs=0.9 if architecture == "t5" else 0.35
    )


@pytest.mark.parametrize("architecture", MODELS["mlm"])
def test_an_encoder_sees_its_own_document_or_is_refused(architecture: str) -> None:
    objective, model = parts("mlm", architecture, cross_document=False)
    if architecture in NO_ISOLATION:
        with torch.no_grad(), pytest.raises(ConfigError, match="documents"):
            objective.check(model, device="cpu")
        return
    with torch.no_grad():
        objective.check(model, device="cpu")
        rows = make_rows([[20, 29]], vocab=300)
        batch = objective.collate(rows)
        together = objective.logits(model, batch)[0, 20:]
        alone = model(input_ids=batch.inputs["input_ids"][:, 20:]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "architecture", "config", "message"),
    [
        ("clm", "bert", {}, "sees the future"),
        ("mlm", "bert", {"is_decoder": True}, "sees only the past"),
        ("clm", "distilbert", {}, r"distilbert has no AutoModelForCausalLM(?s:.*)or objective mlm"),
        ("mlm", "gpt2", {}, r"gpt2 has no AutoModelForMaskedLM(?s:.*)or objective clm"),
        ("clm", "t5", {}, "or objective seq2seq"),
        ("seq2seq", "llama", {}, "or objective clm"),
    ],
)
def test_the_wrong_kind_of_model_is_refused(
    name: str, architecture: str, config: dict[str, Any], message: str
) -> None:
    def refused() -> None:
        objective, model = parts(name, architecture, config=config)
        objective.check(model, device="cpu")

    with torch.no_grad(), pytest.raises(ConfigError, match=message):
        refused()
