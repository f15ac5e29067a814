"""Gradients where ranks, micro-batches and steps use different parameters, beside plain autograd of
one process.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfscale.engine.engine import Engine
from hfscale.engine.start import construction, gathered
from tests.engine.tiny import full_state, tiny_config
from tests.helpers.ranks import RankFailure, run_ranks

LAYERS, WIDTH, ROWS = 4, 6, 3
# step -> rank -> micro-batch -> layers that are left out; the last layer is left out by both ranks
# in step 2
SKIPS = [[[{0}, {1, 2}], [{1}, set()]], [[{3}, {3}], [{3, 0}, {3}]], [[set(), set()], [{2}, {0}]]]


class Branches(nn.Module):
    """Layers of one size, of which a call names those that it leaves out; and one that is never
    used.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.unused = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor, skip: set[int]) -> torch.Tensor:
        x = self.first(x.to(self.first.weight.dtype))
        for number, layer in enumerate(self.layers):
            if number not in skip:
                x = x + layer(x).tanh()
        return x.square().sum()


def inputs(step: int, rank: int, micro: int) -> torch.Tensor:
    return torch.randn(
        ROWS, WIDTH, generator=torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    )


def expected(world_size: int) -> list[dict[str, torch.Tensor]]:
    """Return the gradient of each step at the first weights, the mean over ranks."""
    model = Branches()
    steps = []
    for step, ranks in enumerate(SKIPS):
        for rank, micros in enumerate(ranks[:world_size]):
            for micro, skip in enumerate(micros):
                (model(inputs(step, rank, micro), skip) / world_size).backward()
        steps.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in model.named_parameters()
            }
        )
        model.zero_grad()
    return steps


def gradients(stage: int, options: dict[str, object]) -> list[dict[str, torch.Tensor]]:
    """Return the same by the engine, out of Adam's first moment. The weights stay: the rate is
    0.
    """
    config = tiny_config(stage, world_size=2, clip_norm=0, **options)
    with construction(config, device_type="cpu"):
        made = Branches()
    if stage == 3:
        values = dict(Branches().named_parameters())
        for name, param in made.named_parameters():
            with gathered([param], modify=True):
                param.data.copy_(values[name].data)
    engine = Engine.create(made, config=config, device=torch.device("cpu"))
    beta, before, steps = config.optim.betas[0], {}, []
    for step, ranks in enumerate(SKIPS):
        for micro, skip in enumerate(ranks[engine.all.rank]):
            engine.backward(engine(x=inputs(step, engine.all.rank, micro), skip=skip))
        engine.step(0.0)
        moments = {name: tensors["exp_avg"] for name, tensors in full_state(engine).items()}
        steps.append(
            {
                name: (moment - beta * before.get(name, 0.0)) / (1 - beta)
                for name, moment in moments.items()
            }
        )
        before = moments
    engine.close()
    return steps


SMALL_BUCKETS = {"zero_optimization": {"reduce_bucket_size": 100}}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "world_size", "options"),
    [
        (0, 2, {}),
        (1, 2, {}),
        (2, 2, {"extra": SMALL_BUCKETS}),
        (3, 1, {}),
        pytest.param(2, 2, {}, marks=SLOW),
        pytest.param(1, 2, {"extra": SMALL_BUCKETS}, marks=SLOW),
        pytest.param(1, 2, {"offload": "optimizer"}, marks=SLOW),
        pytest.param(2, 2, {"offload": "optimizer"}, marks=SLOW),
        pytest.param(1, 2, {"precision": "bf16"}, marks=SLOW),
        pytest.param(2, 2, {"precision": "bf16"}, marks=SLOW),
        pytest.param(2, 1, {}, marks=SLOW),
        pytest.param(3, 1, {"offload": "optimizer"}, marks=SLOW),
    ],
)
def test_a_parameter_that_takes_no_part_has_a_gradient_of_zero(stage, world_size, options):
    far = 3e-2 if options.get("precision") == "bf16" else 1e-5
    for rank in run_ranks(gradients, world_size, stage, options):
        for step, (seen, right) in enumerate(zip(rank, expected(world_size), strict=True)):
            for name, grad in right.items():
                error = (seen[name] - grad.flatten()).norm() / max(grad.norm(), 1.0)
                assert error < far, f"step {step}, {name}: off by {error:.1e}"


def diverging() -> None:
    """At ZeRO 3, leave out another layer on each rank."""
    options = {"extra": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    config = tiny_config(3, world_size=2, **options)
    with construction(config, device_type="cpu"):
        made = Branches()
    engine = Engine.create(made, config=config, device=torch.device("cpu"))
    for step in range(2):
        engine.backward(engine(x=inputs(step, engine.all.rank, 0), skip={engine.all.rank}))
        engine.step(0.0)


@pytest.mark.slow
def test_ranks_that_go_through_different_modules_are_refused_at_stage_3():
    with pytest.raises(RankFailure, match="different modules of the model"):
        run_ranks(diverging, 2, fresh=True, timeout_s=60)
