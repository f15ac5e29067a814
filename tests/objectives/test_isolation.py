"""Positions, masks, and what the probe sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfscale.config.schema import Model
from hfscale.errors import ConfigError
from hfscale.models.build import build_model
from hfscale.objectives.isolation import (
    check_apart,
    document_mask,
    document_positions,
    keep_apart,
    movement,
)
from tests.models.families import VOCAB
from tests.objectives.rows import make_rows

DOCUMENTS_BT = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]], dtype=torch.int32)


def test_positions_start_again_in_each_document() -> None:
    assert document_positions(DOCUMENTS_BT).tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_opens_the_past_of_the_own_document(dtype: torch.dtype) -> None:
    mask_B1TT = document_mask(DOCUMENTS_BT, dtype=dtype)
    assert mask_B1TT.shape == (2, 1, 5, 5)
    assert mask_B1TT.dtype == dtype
    for row, documents in enumerate(DOCUMENTS_BT.tolist()):
        for q in range(5):
            for k in range(5):
                assert (mask_B1TT[row, 0, q, k] == 0) == (k <= q and documents[k] == documents[q])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_window_is_that_of_transformers(causal: bool, window: int) -> None:
    from transformers import masking_utils

    overlay = (
        masking_utils.sliding_window_overlay
        if causal
        else masking_utils.sliding_window_bidirectional_overlay
    )
    mask_B1TT = document_mask(
        torch.zeros((1, 20), dtype=torch.int32), dtype=torch.float32, causal=causal, window=window
    )
    for q in range(20):
        for k in range(20):
            assert (mask_B1TT[0, 0, q, k] == 0) == (
                overlay(window)(0, 0, q, k) and (k <= q or not causal)
            )


# --------------------------------------------------------------------- encoders (what mlm will use)
def encoder(
    architecture: str,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> torch.nn.Module:
    shape = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
    section = Model(architecture=architecture, config={**shape, **config}, attention=attention)
    model = build_model(
        section,
        auto_model="AutoModelForMaskedLM",
        vocab_size=VOCAB,
        seq_len=32,
        seed=5,
        dtype=dtype,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 10 if parameter.dim() > 1 else 1  # attention says little at first weights
    return model


BERT = {"num_hidden_layers": 2, "intermediate_size": 48}
ENCODERS = [
    ("bert", BERT),
    ("roberta", {**BERT, "pad_token_id": 3}),
    ("electra", {**BERT, "embedding_size": 32}),
    ("distilbert", {"n_layers": 2, "hidden_dim": 48}),
    (
        "modernbert",
        {
            **BERT,
            "local_attention": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "pad_token_id": 0,
        },
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("architecture", "config"), ENCODERS)
def test_a_document_of_an_encoder_is_as_if_it_were_alone(
    architecture: str, config: dict[str, object], attention: str, dtype: torch.dtype
) -> None:
    model = encoder(architecture, attention=attention, dtype=dtype, **config)

    def logits(ids_BT: Tensor, documents_BT: Tensor) -> Tensor:
        return keep_apart(
            model, {"input_ids": ids_BT}, documents_BT, config=model.config, causal=False
        )

    check_apart(logits, (2, 32), config=model.config)
    rows = make_rows([[9, 14, 9]], vocab=VOCAB)
    assert rows.document_ids_BL is not None
    ids_BT = rows.ids_BL.clamp(min=4)  # no padding ids: RoBERTa counts none of them
    together = logits(ids_BT, rows.document_ids_BL)[0, 9:23]
    alone = model(ids_BT[:, 9:23]).logits[0]
    assert (together - alone).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * alone.norm()
    assert (model(ids_BT).logits[0, 9:23] - alone).norm() > 0.02 * alone.norm()
    # a later token of its own document moves an earlier one
    first = torch.cat([ids_BT[:, :9], ids_BT[:, 9:23].roll(1, 1)], 1)
    assert not torch.equal(logits(first, rows.document_ids_BL[:, :23])[0, 9:22], together[:-1])


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize(
    ("architecture", "words"),
    [("deberta", "cannot keep"), ("deberta-v2", "cannot keep"), ("convbert", "leak")],
)
def test_encoders_that_cannot_are_refused(architecture: str, words: str, micro_batch: int) -> None:
    model = encoder(architecture, attention="eager", **BERT)

    def logits(ids_BT: Tensor, documents_BT: Tensor) -> Tensor:
        return keep_apart(
            model, {"input_ids": ids_BT}, documents_BT, config=model.config, causal=False
        )

    with pytest.raises(
        ConfigError,
        match=rf"{words}(?s:.*){architecture} with attention eager(?s:.*)cross_document=true",
    ):
        check_apart(logits, (micro_batch, 32), config=model.config)


# ---------------------------------------------------------------------------------------- the probe
def one_hot_sum(ids_BT: Tensor, *, seen: slice) -> Tensor:
    """Logits of a model that sees each token itself, and also the tokens of ``seen``."""
    logits_BTV = torch.nn.functional.one_hot(ids_BT, 50).float()
    return logits_BTV + 1e-3 * logits_BTV[:, seen].sum(1, keepdim=True)


def test_the_probe_measures_a_leak_and_nothing_else() -> None:
    def probe(seen: slice) -> float:
        return movement(
            lambda ids: one_hot_sum(ids, seen=seen),
            (2, 16),
            50,
            changed=slice(0, 8),
            watched=slice(8, None),
        )

    assert probe(slice(8, 16)) == 0.0
    assert probe(slice(7, 8)) == pytest.approx(1e-3, rel=1e-3)


def test_noise_is_no_leak_and_blindness_is_no_proof() -> None:
    noise = torch.Generator().manual_seed(0)

    def noisy(ids: Tensor) -> Tensor:
        return one_hot_sum(ids, seen=slice(8, 16)) + 1e-4 * torch.randn(2, 16, 50, generator=noise)

    assert movement(noisy, (2, 16), 50, changed=slice(0, 8), watched=slice(8, None)) == 0.0
    with pytest.raises(RuntimeError, match="blind"):
        movement(
            lambda ids: torch.zeros(2, 16, 50),
            (2, 16),
            50,
            changed=slice(0, 8),
            watched=slice(8, None),
        )
    with pytest.raises(RuntimeError, match="blind"):
        movement(
            lambda ids: torch.full((2, 16, 50), torch.nan),
            (2, 16),
            50,
            changed=slice(0, 8),
            watched=slice(8, None),
        )
