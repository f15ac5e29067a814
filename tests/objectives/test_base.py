"""The contract: options, terms and weights, moving a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfscale.config.schema import Named
from hfscale.config.section import Section
from hfscale.dist.world import Place
from hfscale.errors import ConfigError
from hfscale.objectives.base import (
    OBJECTIVES,
    Batch,
    Model,
    Objective,
    Setting,
    check_options,
    load_objective,
)
from hfscale.registry import load_plugin
from hfscale.training.accounting import Accounting
from tests.objectives.tokenizers import tokenizer


class Options(Section):
    rate: float = 0.15
    size: int = 3


class TwoTerms(Objective):
    """A loss term of weight 0.5, and an accuracy that is only reported."""

    def weights(self) -> dict[str, float]:
        return {"main": 0.5, "accuracy": 0.0}

    def loss(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        return {
            "main": model(x=batch.inputs["x"]).sum(1),
            "accuracy": torch.ones(len(batch.labels_BT)),
        }


def batch_of(x_BT: Tensor, counts: list[int]) -> Batch:
    ids_BT = x_BT.long()
    return Batch(
        {"x": x_BT},
        ids_BT,
        ids_BT,
        {"main": torch.tensor(counts), "accuracy": torch.tensor([1, 1])},
        ids_BT[:, 0],
        ids_BT[:, 0],
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_the_table_loads(name: str) -> None:
    objective = load_objective(Named(name=name), Setting(seq_len=64, tokenizer=tokenizer()))
    assert isinstance(objective, Objective)
    assert issubclass(load_plugin("objective", OBJECTIVES, name).Options, Section)


def test_unknown_objectives_and_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean mlm or clm"):
        load_objective(Named(name="cml"), Setting(seq_len=8))
    with pytest.raises(ConfigError, match=r"size: .*rte: unknown option; did you mean rate"):
        check_options(Options, {"rte": 0.1, "size": "many"})


def test_a_scalar_is_weight_times_sum_times_world_over_count() -> None:
    objective = TwoTerms(Options(), Setting(seq_len=3, data=Place(0, 4)))
    w = torch.tensor(2.0, requires_grad=True)
    batches = [batch_of(torch.ones(2, 3), [3, 2]), batch_of(2 * torch.ones(2, 3), [3, 3])]
    accounting = Accounting(objective)
    assert accounting.counts(batches) == {"main": 11, "accuracy": 4}
    scalars = list(accounting.losses(lambda x: w * x, batches, {"main": 22, "accuracy": 8}))
    assert [s.item() for s in scalars] == [
        pytest.approx(0.5 * 12 * 4 / 22),
        pytest.approx(0.5 * 24 * 4 / 22),
    ]
    sums = accounting.take_sums()
    assert {term: total.item() for term, total in sums.items()} == {"main": 36.0, "accuracy": 4.0}
    assert accounting.take_sums() == {}


def test_a_step_in_which_nothing_is_asked_has_a_zero_loss_and_no_nan() -> None:
    accounting = Accounting(TwoTerms(Options(), Setting(seq_len=3)))
    (scalar,) = accounting.losses(
        lambda x: x, [batch_of(torch.zeros(2, 3), [0, 0])], {"main": 0, "accuracy": 0}
    )
    assert scalar.item() == 0.0


def test_counts_stay_on_the_cpu_when_a_batch_moves() -> None:
    moved = batch_of(torch.ones(2, 3), [1, 2]).to("meta")
    assert (
        moved.inputs["x"].device.type
        == moved.labels_BT.device.type
        == moved.input_ids.device.type
        == "meta"
    )
    assert moved.counts["main"].device.type == "cpu"
    assert moved.document_ids_BT is None
