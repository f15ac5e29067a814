"""Causal language modelling: labels, sums, the same gradient for any cut, documents kept apart."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from hfscale.config.schema import Model, Named
from hfscale.dist.world import Place
from hfscale.errors import ConfigError
from hfscale.models.build import build_model
from hfscale.objectives import isolation
from hfscale.objectives.base import Objective, Setting, load_objective
from hfscale.objectives.cross_entropy import IGNORE_INDEX
from hfscale.objectives.isolation import document_mask
from hfscale.stream.rows import Rows
from hfscale.training.accounting import Accounting
from hfscale.training.evaluator import Evaluator
from tests.models.families import FAMILIES, VOCAB
from tests.objectives.rows import make_rows

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def model_of(
    architecture: str,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> nn.Module:
    values = {
        **(FAMILIES[architecture][1].config if architecture in FAMILIES else _SMALL),
        **config,
    }
    model = Model(architecture=architecture, config=values, attention=attention)
    return build_model(
        model, auto_model="AutoModelForCausalLM", vocab_size=VOCAB, seq_len=32, seed=5, dtype=dtype
    ).eval()


def objective_for(
    model: nn.Module, *, cross_document: bool = True, micro_batch: int = 2, data: Place = Place()
) -> Objective:
    setting = Setting(
        seq_len=32,
        micro_batch=micro_batch,
        data=data,
        cross_document=cross_document,
        model_config=model.config,
    )
    return load_objective(Named(name="clm"), setting)


def test_labels_are_the_next_tokens_and_filler_rows_ask_nothing() -> None:
    model = model_of("gpt2")
    rows = make_rows([[33], [10, 23]], valid=[True, False])
    batch = objective_for(model).collate(rows)
    assert torch.equal(batch.input_ids[0, 1:], batch.labels_BT[0, :-1])
    assert batch.labels_BT[0, -1] == rows.ids_BL[0, -1]
    assert (batch.labels_BT[1] == IGNORE_INDEX).all()
    assert batch.counts["clm"].tolist() == [32, 0]


def test_no_document_predicts_the_next_one() -> None:
    model = model_of("gpt2")
    rows = make_rows([[4, 29], [33]])
    batch = objective_for(model, cross_document=False).collate(rows)
    assert batch.counts["clm"].tolist() == [31, 32]
    assert batch.labels_BT[0, 3] == IGNORE_INDEX  # the last token of the first document
    assert (batch.labels_BT[0, 4:] == rows.ids_BL[0, 5:]).all()


def step_gradient(cuts: list[list[Rows]], model: nn.Module) -> tuple[torch.Tensor, float]:
    """Return the gradient and loss of one step whose rows are cut into ranks (outer list) and
    micro-batches (inner list).
    """
    objective = objective_for(model, cross_document=False, data=Place(0, len(cuts)))
    ranks = [[objective.collate(rows) for rows in micro_batches] for micro_batches in cuts]
    accounting = Accounting(objective)
    counts = {"clm": sum(accounting.counts(batches)["clm"] for batches in ranks)}
    model.zero_grad()
    total = 0.0
    for batches in ranks:
        for scalar in accounting.losses(model, batches, counts):
            (scalar / len(ranks)).backward()  # as the engine averages over ranks
        total += accounting.take_sums()["clm"].item()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), total / counts["clm"]


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut() -> None:
    model = model_of("llama")
    documents = [[33], [5, 28], [11, 11, 11], [1, 32]]
    whole = make_rows(documents)

    def part(start: int, stop: int) -> Rows:
        rows = make_rows(documents[start:stop])
        rows.ids_BL = whole.ids_BL[start:stop]
        return rows

    gradient, loss = step_gradient([[whole]], model)
    for cut in (
        [[part(0, 2), part(2, 4)]],
        [[part(0, 2)], [part(2, 4)]],
        [[part(0, 1), part(1, 2)], [part(2, 3), part(3, 4)]],
    ):
        other_gradient, other_loss = step_gradient(cut, model)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-7)
        assert other_loss == pytest.approx(loss, rel=1e-6)
    assert loss == pytest.approx(math.log(VOCAB), abs=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("gpt_neox", {"intermediate_size": 48}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("mistral", {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": None}),
        ("mistral", {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 8}),
        ("qwen2", {"num_key_value_heads": 2}),
        (
            "qwen2",
            {
                "num_key_value_heads": 2,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
        ),
        (
            "gemma3_text",
            {
                "num_key_value_heads": 2,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        ("roberta", {"is_decoder": True, "pad_token_id": 3}),
    ],
)
def test_a_document_scores_as_if_it_were_alone(
    architecture: str, config: dict[str, object], attention: str, dtype: torch.dtype
) -> None:
    """Where layers attend to a window of 8, a document of 14 shows that they still do."""
    model = model_of(architecture, attention=attention, dtype=dtype, **config)
    objective = objective_for(model, cross_document=False)
    objective.check(model, device="cpu")
    rows = make_rows([[9, 14, 10], [20, 13, 0]])
    together = objective.logits(model, objective.collate(rows))[0, 9:23]  # type: ignore[attr-defined]
    alone = model(rows.ids_BL[0:1, 9:23], use_cache=False).logits[0]
    assert (together - alone).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * alone.norm()
    whole = model(rows.ids_BL[0:1, :-1], use_cache=False).logits[0, 9:23]
    assert (whole - alone).norm() > 0.02 * alone.norm(), (
        "seeing the other document changes nothing in this model"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_that_leak_are_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("gpt2", dtype=dtype)
    whole = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda attention_mask=None, **inputs: whole(
            attention_mask=None
            if attention_mask is None
            else torch.ones(attention_mask.shape[::3][0], 32, dtype=torch.long),
            **inputs,
        ),
    )
    objective_for(model).check(model, device="cpu")  # nothing to keep apart
    with pytest.raises(ConfigError, match=r"documents leak(?s:.*)data\.cross_document=true"):
        objective_for(model, cross_document=False).check(model, device="cpu")


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}, "cannot keep documents apart"),
        (
            "rwkv",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "attention_hidden_size": 32,
                "context_length": 64,
            },
            "documents leak",
        ),
        (
            "llama4_text",
            {
                **_SMALL,
                "intermediate_size": 48,
                "intermediate_size_mlp": 48,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "num_local_experts": 2,
                "pad_token_id": 0,
            },
            "layers of chunked_attention",
        ),
    ],
)
def test_what_cannot_keep_documents_apart_is_refused_only_where_it_must(
    architecture: str, config: dict[str, object], words: str
) -> None:
    section = Model(architecture=architecture, config=config, attention="eager")
    model = build_model(
        section, auto_model="AutoModelForCausalLM", vocab_size=VOCAB, seq_len=32, seed=5
    ).eval()
    objective_for(model).check(model, device="cpu")
    with pytest.raises(
        ConfigError,
        match=rf"{words}(?s:.*){architecture} with attention eager(?s:.*)data\.cross_document=true",
    ):
        objective_for(model, cross_document=False).check(model, device="cpu")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_mask_is_made_once_a_batch_for_all_layers(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = model_of(architecture), []
    monkeypatch.setattr(
        isolation,
        "document_mask",
        lambda *args, **options: made.append(document_mask(*args, **options)) or made[-1],
    )
    seen = []
    for name, part in model.named_modules():
        if name.endswith((".attn", ".self_attn")):
            part.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
            )
    objective = objective_for(model, cross_document=False)
    batches = [objective.collate(make_rows([[9, 24], [33, 0]], seed=seed)) for seed in range(3)]
    accounting = Accounting(objective)
    for loss in accounting.losses(model, batches, accounting.counts(batches)):
        loss.backward()
    Evaluator(objective, [make_rows([[9, 24], [33, 0]])]).run(Bare(model))  # type: ignore[arg-type]
    assert len(made) == 4
    assert [mask.data_ptr() for mask in seen] == [
        mask.data_ptr() for mask in made for _ in range(2)
    ], "each of two layers takes that one"


class Bare:
    """What an evaluator needs of an engine."""

    def __init__(self, model: nn.Module) -> None:
        self.module, self.device = model, torch.device("cpu")

    def __call__(self, **inputs: torch.Tensor) -> object:
        return self.module(**inputs)

    def eval_mode(self) -> nullcontext[None]:
        return nullcontext()


def test_an_encoder_is_refused_because_it_sees_the_future() -> None:
    model = model_of("bert")
    with pytest.raises(ConfigError, match=r"sees the future(?s:.*)mlm"):
        objective_for(model).check(model, device="cpu")
    decoder = model_of("bert", is_decoder=True)
    objective_for(decoder).check(decoder, device="cpu")
