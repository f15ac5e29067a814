"""Every optimizer on real engines, at each ZeRO stage and on several ranks, against its formula in
plain torch on one process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.state import CheckpointState
from hfscale.config.schema import Checkpoint, RunConfig
from hfscale.dist.world import Place
from hfscale.engine.engine import Engine
from hfscale.engine.muon import orthogonal
from hfscale.engine.optimizers import make_optimizer
from hfscale.errors import CheckpointError, ConfigError
from tests.engine.test_engine import views
from tests.engine.tiny import full_state, rate, rows, same, tiny_config, tiny_engine, tiny_model
from tests.engine.tiny import train_step as step_of
from tests.helpers.ranks import run_ranks

STEPS = 6
SAVES = Checkpoint.model_validate({"every_minutes": None, "async": False})
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lion": {"name": "lion", "lr": 1e-3},
    "sgd": {"name": "sgd", "lr": 0.1},
    "muon": {"name": "muon"},
}


def train(stage: int, name: str, precision: str = "fp32", **engine: object) -> dict[str, Any]:
    size = torch.distributed.get_world_size()
    config = tiny_config(
        stage, precision, world_size=size, accumulation=1, optim=OPTIMIZERS[name], **engine
    )
    made = tiny_engine(config)
    losses = [step_of(made, config, step)[0] for step in range(1, STEPS + 1)]
    result = {"losses": losses, "state": full_state(made), "scalars": made.scalars()}
    made.close()
    return result


# ----------------------------------------------------------------------- the formulas, one process
def plain(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return losses and last weights of ``train`` by the formulas of the papers."""
    torch.set_num_threads(1)
    config = tiny_config(0, accumulation=1, optim=OPTIMIZERS[name])
    model = tiny_model()
    kept: dict[str, dict[str, torch.Tensor]] = {}
    losses = []
    for step in range(1, STEPS + 1):
        ids, counted = rows(step)
        logits = model(input_ids=ids).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (each * counted[:, 1:].flatten()).sum() / counted[:, 1:].sum()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        with torch.no_grad():
            for key, param in model.named_parameters():
                decay = config.optim.weight_decay if param.ndim > 1 else 0.0
                state = kept.setdefault(key, {})
                move(name, key, param, state, lr=rate(config, step), decay=decay, step=step)
    return losses, {key: param.detach() for key, param in model.named_parameters()}


def move(
    name: str,
    key: str,
    weight: torch.Tensor,
    state: dict[str, torch.Tensor],
    *,
    lr: float,
    decay: float,
    step: int,
) -> None:
    gradient = weight.grad
    zero = torch.zeros_like(weight)
    if name == "sgd":
        gradient = gradient + decay * weight
        state["m"] = 0.9 * state.get("m", zero) + gradient
        weight -= lr * state["m"]
    elif name == "lion":
        momentum = state.get("m", zero)
        update = (0.9 * momentum + 0.1 * gradient).sign()
        state["m"] = 0.99 * momentum + 0.01 * gradient
        weight -= lr * (update + decay * weight)
    elif ".h." in key and weight.ndim == 2:
        state["m"] = 0.95 * state.get("m", zero) + gradient
        update = newton_schulz(gradient + 0.95 * state["m"]) * 0.2 * math.sqrt(max(weight.shape))
        weight -= lr * (update + decay * weight)
    else:
        state["m"] = 0.9 * state.get("m", zero) + 0.1 * gradient
        state["v"] = 0.95 * state.get("v", zero) + 0.05 * gradient**2
        mean, square = state["m"] / (1 - 0.9**step), state["v"] / (1 - 0.95**step)
        weight -= lr * (mean / (square.sqrt() + 1e-8) + decay * weight)


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Jordan et al. 2024, as published, on a matrix that may be tall."""
    if x.size(0) > x.size(1):
        return newton_schulz(x.T).T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.fixture(scope="module")
def by_formula() -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    return {name: plain(name) for name in OPTIMIZERS}


CASES = [(0, 2), (1, 2), (2, 2), (3, 2), (3, 1)]
# a bias of keys moves all scores of a query alike: its gradient is rounding, whose sign Lion takes
NO_GRADIENT = slice(24, 48)  # of c_attn.bias


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("stage", "ranks"), CASES)
def test_each_is_its_formula_however_it_is_cut(by_formula, name, stage, ranks):
    losses, weights = by_formula[name]
    assert losses[0] - losses[-1] > 0.1, "it learns"
    result = run_ranks(train, ranks, stage, name)[0]
    assert result["losses"] == pytest.approx(losses, abs=1e-5)
    for key, weight in weights.items():
        there = result["state"][key]["weight"].view(weight.shape)
        if name == "lion" and key.endswith("c_attn.bias"):
            there[NO_GRADIENT] = weight[NO_GRADIENT]
        torch.testing.assert_close(there, weight, atol=1e-5, rtol=0, msg=key)
    kinds = {kind for tensors in result["state"].values() for kind in tensors}
    assert kinds == {"weight"} | {"lion": {"exp_avg"}, "sgd": {"momentum_buffer"}}.get(
        name, {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    )


@pytest.mark.parametrize(("stage", "name"), [(1, "muon"), (3, "muon"), (2, "lion"), (0, "sgd")])
def test_what_is_kept_beside_weights_is_state_and_restores_a_run_exactly(stage, name):
    result = run_ranks(views, 2, stage, "fp32", optim=OPTIMIZERS[name])[0]
    assert result["state"] == [] and result["logits"] and result["losses"]
    assert result["scalars"]["adam_step"] == (4 if name == "muon" else 0)


def changed(folder: Path, stage: int) -> dict[str, Any]:
    """Train under AdamW, then go on under Muon, twice; tell what was said and loaded."""
    place = Place(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def opened(**optim: object) -> tuple[RunConfig, Engine, CheckpointManager]:
        config = tiny_config(stage, world_size=place.size, accumulation=1, optim=optim)
        return config, tiny_engine(config), CheckpointManager(folder, config=SAVES, place=place)

    config, first, checkpoints = opened()
    step_of(first, config, 1)
    checkpoints.save(first, CheckpointState(step=1, optimizer="adamw"))
    trained = full_state(first)
    first.close()
    config, refused, checkpoints = opened(name="muon")
    before = full_state(refused)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_latest(refused)
    untouched = same(before, full_state(refused))
    refused.close()
    config, moved, checkpoints = opened(name="muon", reset=True)
    assert checkpoints.load_latest(moved) is not None
    loaded, scalars = full_state(moved), moved.scalars()
    step_of(moved, config, 2)
    checkpoints.save(moved, CheckpointState(step=2, optimizer="muon"))
    saved = full_state(moved)
    moved.close()
    config, resumed, checkpoints = opened(name="muon", reset=True)
    assert checkpoints.load_latest(resumed) is not None
    again = same(saved, full_state(resumed))
    resumed.close()
    return {
        "refused": str(error.value),
        "untouched": untouched,
        "weights": [
            name
            for name in trained
            if not torch.equal(trained[name]["weight"], loaded[name]["weight"])
        ],
        "kept": max(
            float(tensor.abs().max())
            for tensors in loaded.values()
            for kind, tensor in tensors.items()
            if kind != "weight"
        ),
        "scalars": scalars,
        "again": again,
    }


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_of_another_optimizer_is_refused_or_gives_its_weights_alone(tmp_path, stage):
    seen = run_ranks(changed, 2, tmp_path, stage)[0]
    assert "trained by another optimizer" in seen["refused"]
    assert "adamw; optim.name=muon" in seen["refused"] and "optim.reset=true" in seen["refused"]
    assert seen["untouched"] == seen["weights"] == [] and seen["kept"] == 0.0
    assert seen["scalars"]["adam_step"] == 0
    assert seen["again"] == [], "a reset is of another optimizer's checkpoints alone"


def test_muon_without_matrices_is_refused():
    config = tiny_config(1, optim={"name": "muon"})
    model = tiny_model()
    for name, param in model.named_parameters():
        param.requires_grad_(".h." not in name)
    with pytest.raises(ConfigError, match="none of them is trained"):
        make_optimizer(model, config.optim)


def test_orthogonal_matrices_of_experts_and_tall_ones():
    torch.manual_seed(1)
    experts = torch.randn(3, 40, 16)
    values = torch.linalg.svdvals(orthogonal(experts))
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(orthogonal(experts)[1], orthogonal(experts[1]))
