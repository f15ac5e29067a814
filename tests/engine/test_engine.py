"""The real DeepSpeed engine on real gloo ranks."""

from __future__ import annotations

import math

import pytest
import torch

from hfscale.engine.engine import Engine
from hfscale.engine.fragments import tied
from hfscale.engine.gradients import norm
from hfscale.engine.start import construction, gathered
from hfscale.errors import ConfigError, UnhealthyError
from tests.engine.tiny import (
    accumulation_error,
    full_state,
    logits,
    rate,
    rows,
    same,
    tiny_config,
    tiny_engine,
    tiny_model,
    train_step,
)
from tests.helpers.ranks import run_ranks

STAGES = (0, 1, 2, 3)


def train(
    stage: int, precision: str, *, accumulation: int = 2, steps: int = 10, **engine: object
) -> dict[str, object]:
    world_size = torch.distributed.get_world_size()
    config = tiny_config(
        stage, precision, world_size=world_size, accumulation=accumulation, **engine
    )
    made = tiny_engine(config)
    history = [train_step(made, config, step) for step in range(1, steps + 1)]
    result = {
        "losses": [loss for loss, _ in history],
        "norms": [stats.grad_norm for _, stats in history],
        "rates": [stats.lr for _, stats in history],
        "state": full_state(made),
        "scalars": made.scalars(),
        "tied": tied(made.module),
    }
    made.close()
    made.close()  # a second time does nothing
    return result


@pytest.fixture(scope="module")
def reference():
    return run_ranks(train, 1, 0, "fp32", accumulation=1)[0]


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 2), (2, 2), (3, 1), (3, 2), (2, 1)])
def test_every_stage_and_size_computes_what_one_process_does(reference, stage, world_size):
    ranks = run_ranks(train, world_size, stage, "fp32")
    assert reference["losses"][0] - reference["losses"][-1] > 0.5
    assert all(norm > 0.5 for norm in reference["norms"][:5]), "clipping is meant to be active"
    for result in ranks:
        assert result["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-3)
    assert ranks[0]["norms"] == ranks[-1]["norms"]
    for name, tensors in ranks[0]["state"].items():
        torch.testing.assert_close(
            tensors["weight"], reference["state"][name]["weight"], atol=2e-4, rtol=0
        )


def test_rates_and_scalars(reference):
    config = tiny_config()
    assert reference["rates"] == [rate(config, step) for step in range(1, 11)]
    assert reference["scalars"] == {"adam_step": 10, "loss_scaler": None}
    assert reference["tied"] == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in reference["state"]


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (1, {"offload": "optimizer"}),
        (2, {"offload": "optimizer"}),
        (3, {"offload": "parameters"}),
        (1, {"activation_checkpointing": True}),
        (3, {"activation_checkpointing": True}),
    ],
)
def test_options_do_not_change_the_numbers(reference, stage, options):
    result = run_ranks(train, 2, stage, "fp32", steps=5, **options)[0]
    assert result["losses"] == pytest.approx(reference["losses"][:5], abs=1e-5)


@pytest.mark.slow
def test_bf16_follows_fp32(reference):
    for stage in STAGES:
        result = run_ranks(train, 2, stage, "bf16", steps=5)[0]
        assert result["losses"] == pytest.approx(reference["losses"][:5], abs=0.03)
        assert {tensors["weight"].dtype for tensors in result["state"].values()} == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_of_16_bit_are_added_up_in_fp32(stage):
    assert run_ranks(accumulation_error, 1, stage, 16)[0] < 1e-6


def test_the_norm_of_a_large_gradient_is_exact_at_stage_0():
    gradients = [
        torch.randn(number, generator=torch.Generator().manual_seed(1)) for number in (2**23 + 7, 3)
    ]
    right = torch.cat(gradients).double().norm().item()
    assert norm(gradients).item() == pytest.approx(right, rel=1e-6)


def decay_groups(stage: int) -> list[tuple[float, int]]:
    engine = tiny_engine(tiny_config(stage, world_size=2))
    result = [
        (group["weight_decay"], len(group["params"]) if stage == 0 else -1)
        for group in engine._optimizer.param_groups
    ]
    engine.close()
    return result


def test_vectors_do_not_decay():
    assert run_ranks(decay_groups, 2, 0)[0] == [(0.1, 10), (0.0, 18)]
    assert run_ranks(decay_groups, 2, 3)[0] == [(0.1, -1), (0.0, -1)]


def vetoed(stage: int, precision: str) -> dict[str, object]:
    config = tiny_config(stage, precision, world_size=2)
    norms: list[float] = []
    states = []
    for veto in (True, False):
        engine = tiny_engine(config)
        train_step(engine, config, 1)
        before, seen, scalars = full_state(engine), logits(engine), engine.scalars()
        if veto:
            _, stats = train_step(engine, config, 2, allow=lambda norm: bool(norms.append(norm)))
            assert norms == [stats.grad_norm] and not stats.updated
            assert same(before, full_state(engine)) == [], "weights and moments"
            assert torch.equal(seen, logits(engine)) and scalars == engine.scalars()
        for step in (3, 4):
            _, stats = train_step(engine, config, step, allow=lambda norm: norm > 0)
            assert stats.updated
        states.append(full_state(engine))
        engine.close()
    return {"norms": norms, "differ": same(*states)}


@pytest.mark.parametrize(("stage", "precision"), [*((n, "fp32") for n in STAGES), (2, "bf16")])
def test_a_vetoed_update_changes_nothing_on_any_rank_and_training_goes_on(stage, precision):
    one, other = run_ranks(vetoed, 2, stage, precision)
    assert one["norms"] == other["norms"]
    assert one["differ"] == other["differ"] == [], (
        "as if the step had not been: no gradient is left over"
    )


def poisoned(stage: int, precision: str) -> tuple[str, list[str], bool]:
    config = tiny_config(stage, precision, world_size=2)
    engine = tiny_engine(config)
    train_step(engine, config, 1)
    before, seen = full_state(engine), logits(engine)
    out = engine(input_ids=rows(2)[0]).logits
    # one rank only
    engine.backward(out.float().mean() * (float("nan") if engine.all.rank == 1 else 1.0))
    message = ""
    try:
        engine.step(0.01)
    except UnhealthyError as error:
        message = str(error)
    result = message, same(before, full_state(engine)), torch.equal(seen, logits(engine))
    engine.close()
    return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops_all_ranks_before_the_weights_change(stage, precision):
    for message, changed, same_logits in run_ranks(poisoned, 2, stage, precision, fresh=False):
        assert "gradient is not finite" in message and changed == [] and same_logits


def dropped(stage: int, precision: str) -> tuple[list[str], list[str], bool]:
    config = tiny_config(stage, precision, world_size=2)
    states, changed, updated = [], [], True
    for poison in (True, False):
        engine = tiny_engine(config)
        train_step(engine, config, 1)
        before = full_state(engine)
        if poison:
            out = engine(input_ids=rows(2)[0]).logits
            engine.backward(out.float().mean() * (float("nan") if engine.all.rank == 1 else 1.0))
            updated = engine.step(0.01, allow=math.isfinite).updated
            changed = same(before, full_state(engine))
        for step in (3, 4):
            train_step(engine, config, step)
        states.append(full_state(engine))
        engine.close()
    return changed, same(*states), updated


@pytest.mark.parametrize(("stage", "precision"), [*((n, "fp32") for n in STAGES), (3, "bf16")])
def test_a_gradient_that_is_not_finite_is_dropped_where_that_is_allowed(stage, precision):
    for changed, differ, updated in run_ranks(dropped, 2, stage, precision):
        assert changed == [] and differ == [] and not updated


def views(stage: int, precision: str, **options: object) -> dict[str, object]:
    """Overwrite the live views with the state of another engine, and compute."""
    config = tiny_config(stage, precision, world_size=2, **options)
    trained = tiny_engine(config)
    for step in (1, 2):
        train_step(trained, config, step)
    state, seen, scalars = full_state(trained), logits(trained), trained.scalars()
    following = [train_step(trained, config, step)[0] for step in (3, 4)]
    trained.close()
    fresh = tiny_engine(config)
    for fragment in fresh.fragments(owned=False):
        for key, value in fragment.tensors.items():
            value.copy_(state[fragment.name][key][fragment.start : fragment.start + fragment.numel])
    fresh.load_scalars(scalars)
    fresh.after_load()
    result = {
        "state": same(state, full_state(fresh)),
        "logits": torch.equal(seen, logits(fresh)),
        "losses": [train_step(fresh, config, step)[0] for step in (3, 4)] == following,
        "scalars": fresh.scalars(),
    }
    fresh.close()
    return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_fragments_are_the_whole_state_and_writing_them_restores_it(stage, precision):
    for result in run_ranks(views, 2, stage, precision):
        assert result == {
            "state": [],
            "logits": True,
            "losses": True,
            "scalars": {"adam_step": 4, "loss_scaler": None},
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "offload"), [(2, "optimizer"), (3, "optimizer"), (3, "parameters")]
)
def test_offloaded_state_is_saved_and_restored_too(stage, offload):
    assert run_ranks(views, 2, stage, "bf16", offload=offload)[0]["losses"] is True


class WithFrozenParts(torch.nn.Module):
    """A frozen layer, a persistent buffer and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.trained = torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)
        self.frozen.requires_grad_(False)
        self.register_buffer("counter", torch.tensor(7))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x_BF: torch.Tensor) -> torch.Tensor:
        return self.trained(self.frozen(x_BF).relu()) * self.counter / 7


def frozen_parts(stage: int) -> tuple[set[str], list[str]]:
    plain = WithFrozenParts().state_dict()
    engine = Engine.create(
        WithFrozenParts(), config=tiny_config(stage, world_size=2), device=torch.device("cpu")
    )
    state = full_state(engine)
    engine.backward(engine(x_BF=torch.ones(2, 3)).sum())
    engine.step(0.1)
    after = full_state(engine)
    changed = [
        name for name in plain if not torch.equal(plain[name].flatten(), after[name]["weight"])
    ]
    assert state.keys() == plain.keys() and all(
        torch.equal(plain[name].flatten(), state[name]["weight"]) for name in plain
    )
    engine.close()
    return {name for name in state if "exp_avg" in state[name]}, changed


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_and_persistent_buffers_are_state_too(stage):
    for trained, changed in run_ranks(frozen_parts, 2, stage):
        assert trained == {"trained.weight", "trained.bias"} == set(changed)


class WithUnusedPart(WithFrozenParts):
    """A parameter that is trained, says the config, but that no loss reaches (the pooler of an
    encoder without a head).
    """

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Linear(5, 3)


def unused_parts(stage: int) -> tuple[dict[str, list[float]], list[str]]:
    config = tiny_config(stage, world_size=2)
    engine = Engine.create(WithUnusedPart(), config=config, device=torch.device("cpu"))
    engine.backward(engine(x_BF=torch.ones(2, 3)).sum())
    engine.step(0.1)
    state, scalars = full_state(engine), engine.scalars()
    engine.close()
    fresh = Engine.create(WithUnusedPart(), config=config, device=torch.device("cpu"))
    for fragment in fresh.fragments(owned=False):
        for kind, tensor in fragment.tensors.items():
            tensor.copy_(
                state[fragment.name][kind][fragment.start : fragment.start + fragment.numel]
            )
    fresh.load_scalars(scalars)
    fresh.after_load()
    fresh.backward(fresh(x_BF=torch.ones(2, 3)).sum())
    fresh.step(0.1)
    after = full_state(fresh)
    assert fresh.scalars()["adam_step"] == 2
    fresh.close()
    return {name: after[name]["weight"].tolist() for name in after}, [
        name for name in after if "exp_avg" in after[name]
    ]


@pytest.mark.slow
def test_a_parameter_without_gradient_is_the_same_at_every_stage():
    found = [run_ranks(unused_parts, 2, stage)[0] for stage in STAGES]
    for weights, trained in found:
        assert sorted(trained) == ["trained.bias", "trained.weight", "unused.bias", "unused.weight"]
        for name, values in weights.items():
            assert values == pytest.approx(found[0][0][name], rel=1e-6), name


def build_partitioned(stage: int) -> tuple[bool, list[tuple[int, ...]], float]:
    from transformers import AutoModelForCausalLM

    shape = tiny_model().config
    config = tiny_config(stage, world_size=2)
    with construction(config, device_type="cpu"):
        model = AutoModelForCausalLM.from_config(shape)
    weight = model.transformer.wte.weight
    split = weight.numel() == 0
    with gathered([weight], modify=True):
        # rank 0's value is the one that stays
        weight.data.fill_(float(torch.distributed.get_rank()) + 2.0)
    engine = Engine.create(model, config=config, device=torch.device("cpu"))
    with gathered([engine.module.transformer.wte.weight]):
        value = engine.module.transformer.wte.weight.mean().item()
    shapes = [
        fragment.shape
        for fragment in engine.fragments()
        if fragment.name == "transformer.wte.weight"
    ]
    engine.close()
    return split, shapes, value


def test_a_model_is_partitioned_while_it_is_built_at_stage_3_only():
    assert run_ranks(build_partitioned, 2, 3) == [(True, [(97, 24)], 2.0)] * 2
    assert all(not split and value == 2.0 for split, _, value in run_ranks(build_partitioned, 2, 1))


def test_an_architecture_without_activation_checkpointing_is_refused():
    config = tiny_config(0, activation_checkpointing=True)
    with pytest.raises(ConfigError, match="activation checkpointing"):
        Engine.create(torch.nn.Linear(2, 2), config=config, device=torch.device("cpu"))
