"""InfoNCE by gradient caching: the loss and gradient of one big batch for any cut; views, pooling,
metrics.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hfscale.config.schema import Model, Named
from hfscale.dist.group import everybody
from hfscale.dist.world import Place
from hfscale.errors import ConfigError
from hfscale.models.build import build_model
from hfscale.models.pooling import pool
from hfscale.objectives.base import Batch, Objective, Setting, load_objective
from hfscale.stream.rows import Rows
from hfscale.training.accounting import Accounting
from tests.helpers.ranks import run_ranks
from tests.objectives.rows import cut_rows, make_rows
from tests.objectives.tokenizers import tokenizer

T, N = 32, 64
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def contrastive(data: Place = Place(), **options: Any) -> Objective:
    return load_objective(
        Named(name="contrastive", options=options),
        Setting(seq_len=T, global_batch=N, seed=3, tokenizer=tokenizer(), data=data),
    )


def model_for(objective: Objective, *, dropout: float = 0.0) -> torch.nn.Module:
    config = {**BERT, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return build_model(
        Model(architecture="bert", config=config),
        auto_model=objective.auto_model,
        vocab_size=len(tokenizer()),
        seq_len=T,
        seed=5,
    )


def rows_of(first: int = 0, stop: int = N) -> Rows:
    return cut_rows(make_rows([[5, 20, 8]] * N, vocab=300), first, stop)


def gradient(
    objective: Objective, model: torch.nn.Module, batches: list[Batch]
) -> tuple[torch.Tensor, dict[str, Any]]:
    counts = dict.fromkeys(objective.weights(), N)
    if "mlm" in counts:
        counts["mlm"] = 40  # any number, the same for every cut
    model.zero_grad()
    accounting = Accounting(objective)
    for scalar in accounting.losses(model, batches, counts):
        (scalar / objective.setting.data.size).backward()
    flat = torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in model.parameters()
        ]
    )
    return flat, {term: total.item() for term, total in accounting.take_sums().items()}


def direct_loss(objective: Any, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return InfoNCE written out, of one batch in one process."""
    hidden = model(
        input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"]
    ).last_hidden_state
    mask = batch.inputs["attention_mask"][..., None]
    a, p = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).chunk(2)
    return F.cross_entropy(a @ p.T / 0.05, torch.arange(len(a)))


def test_gradient_caching_gives_the_gradient_of_one_big_batch() -> None:
    objective = contrastive()
    model = model_for(objective)
    whole = objective.collate(rows_of())
    loss = direct_loss(objective, model, whole)
    loss.backward()
    wanted = torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in model.parameters()
        ]
    )
    for cut in (64, 32, 16, 4):
        batches = [objective.collate(rows_of(first, first + cut)) for first in range(0, N, cut)]
        got, sums = gradient(objective, model, batches)
        assert sums["contrastive"] / N == pytest.approx(loss.item(), rel=1e-5), cut
        assert (got - wanted).norm() <= 1e-5 * wanted.norm(), cut


def of_ranks(micro_batch: int, mlm_weight: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the gradient, averaged over the ranks as the engine does, and the sums of the global
    batch. Runs on every rank.
    """
    import torch.distributed as torch_dist

    place = everybody()
    objective = contrastive(mlm_weight=mlm_weight, data=place)
    share = N // place.size
    starts = range(place.rank * share, (place.rank + 1) * share, micro_batch)
    batches = [objective.collate(rows_of(first, first + micro_batch)) for first in starts]
    got, sums = gradient(objective, model_for(objective), batches)
    totals = torch.tensor([sums[term] for term in sorted(sums)])
    torch_dist.all_reduce(got)
    torch_dist.all_reduce(totals)
    return got, dict(zip(sorted(sums), totals.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mlm_weight", [0.0, 0.1])
def test_negatives_are_those_of_all_ranks(mlm_weight: float) -> None:
    objective = contrastive(mlm_weight=mlm_weight)
    wanted, wanted_sums = gradient(objective, model_for(objective), [objective.collate(rows_of())])
    assert wanted.norm() > 0.01
    for ranks, micro_batch in ((2, 32), (4, 16), (4, 4)):
        got, sums = run_ranks(of_ranks, ranks, micro_batch, mlm_weight)[0]
        assert (got - wanted).norm() <= 1e-5 * wanted.norm(), (ranks, micro_batch)
        assert sums == pytest.approx(wanted_sums, rel=1e-5)


def test_the_second_pass_repeats_the_dropout_of_the_first() -> None:
    objective = contrastive(views="dropout")
    model = model_for(objective, dropout=0.1).train()
    batch = objective.collate(rows_of())
    n = len(batch.position_B)
    assert torch.equal(batch.inputs["input_ids"][:n], batch.inputs["input_ids"][n:])
    torch.manual_seed(1)
    loss = direct_loss(objective, model, batch)  # the same draws: one forward of both views
    loss.backward()
    wanted = torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in model.parameters()
        ]
    )
    torch.manual_seed(1)
    got, sums = gradient(objective, model, [batch])
    assert sums["contrastive"] / N == pytest.approx(loss.item(), rel=1e-5)
    assert sums["alignment"] > 1e-3, "the two views do not differ: no dropout"
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_crops_are_spans_of_the_longest_document_of_the_row() -> None:
    objective, rows = contrastive(crop=(0.2, 0.6)), rows_of()
    batch = objective.collate(rows)
    lengths = set()
    for k, (ids, mask) in enumerate(
        zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    ):
        view = ids[: int(mask.sum())].tolist()
        text = rows.ids_BL[k % N, 5:25].tolist()
        assert view[0] == tokenizer().cls_token_id
        assert any(text[at : at + len(view) - 1] == view[1:] for at in range(20)), (view, text)
        lengths.add(len(view) - 1)
    assert len(lengths) > 4 and min(lengths) >= 4 and max(lengths) <= 12


def test_metrics_are_what_their_papers_define() -> None:
    objective: Any = contrastive()
    z = F.normalize(torch.randn(2, N, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    valid = torch.ones(N, dtype=torch.int64)
    loss, sums = objective.compare(z.requires_grad_(), valid)
    a, p = z.detach()
    assert loss.item() == pytest.approx(
        F.cross_entropy(a @ p.T / 0.05, torch.arange(N), reduction="sum").item(), rel=1e-5
    )
    assert sums["alignment"].mean().item() == pytest.approx(
        (a - p).norm(dim=1).square().mean().item(), rel=1e-5
    )
    pairs = torch.pdist(a).square().mul(-2).exp().mean().log().item()
    assert objective.report({"uniformity": sums["uniformity"].mean().item()})[
        "uniformity"
    ] == pytest.approx(pairs, rel=1e-4)
    perfect = torch.eye(N)[None].expand(2, N, N).contiguous()
    assert objective.compare(perfect.requires_grad_(), valid)[1]["retrieval_accuracy"].mean() == 1
    valid[3] = 0  # a filler row is neither asked nor a negative
    loss, sums = objective.compare(z, valid)
    keep = [n for n in range(N) if n != 3]
    assert loss.item() == pytest.approx(
        F.cross_entropy(a[keep] @ p[keep].T / 0.05, torch.arange(N - 1), reduction="sum").item(),
        rel=1e-5,
    )
    assert all(values[3] == 0 for values in sums.values())


def test_pooling() -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.equal(pool(hidden, mask, "cls"), hidden[:, 0])
    assert torch.equal(pool(hidden, mask, "last"), torch.stack([hidden[0, 3], hidden[1, 1]]))
    assert torch.equal(
        pool(hidden, mask, "mean"), torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    )


def test_what_cannot_be_contrasted_is_refused() -> None:
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(ConfigError, match="no negatives"):
        load_objective(
            Named(name="contrastive"), Setting(seq_len=T, global_batch=1, tokenizer=tokenizer())
        )
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, pad_token="[PAD]")
    with pytest.raises(ConfigError, match=r"no cls token(?s:.*)hfscale tokenizer add"):
        load_objective(
            Named(name="contrastive", options={"pooling": "cls"}),
            Setting(seq_len=T, global_batch=4, tokenizer=bare),
        )
    with pytest.raises(ConfigError, match="longer than the longest"):
        contrastive(crop=(0.5, 0.1))
    assert math.isclose(contrastive().weights()["contrastive"], 1.0)


def test_views_that_would_be_the_same_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"too short to crop(?s:.*)at least 50"):
        contrastive(crop=(0.02, 0.5))
    for dropout, refused in ((0.0, True), (0.1, False)):
        objective = contrastive(views="dropout")
        model = model_for(objective, dropout=dropout).eval()
        objective.setting = replace(objective.setting, model_config=model.config)
        with (
            torch.no_grad(),
            pytest.raises(ConfigError, match="are the same") if refused else nullcontext(),
        ):
            objective.check(model, device="cpu")


def test_hard_negatives_stand_beside_all_answers() -> None:
    objective: Any = contrastive()
    a, p, h = z = F.normalize(
        torch.randn(3, N, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    valid = torch.ones(N, dtype=torch.int64)
    valid[3] = 0
    keep = [n for n in range(N) if n != 3]
    loss, sums = objective.compare(z.requires_grad_(), valid)
    scores = a[keep] @ torch.cat([p[keep], h[keep]]).T / 0.05
    assert loss.item() == pytest.approx(
        F.cross_entropy(scores, torch.arange(N - 1), reduction="sum").item(), rel=1e-5
    )
    assert sums["retrieval_accuracy"].sum() == (scores.argmax(1) == torch.arange(N - 1)).sum()
    loss.backward()
    assert z.grad is not None and z.grad[2, keep].norm() > 0 and z.grad[:, 3].norm() == 0


def test_an_embedding_that_cannot_see_the_text_is_refused() -> None:
    for pooling, refused in (("cls", True), ("last", False), ("mean", False)):
        objective = contrastive(pooling=pooling)
        gpt2 = build_model(
            Model(
                architecture="gpt2",
                config={"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
            ),
            auto_model="AutoModel",
            vocab_size=len(tokenizer()),
            seq_len=T,
            seed=5,
        ).eval()
        for model, wrong in ((gpt2, refused), (model_for(objective).eval(), False)):
            objective.setting = replace(objective.setting, model_config=model.config)
            with (
                torch.no_grad(),
                pytest.raises(ConfigError, match="does not see the text")
                if wrong
                else nullcontext(),
            ):
                objective.check(model, device="cpu")
