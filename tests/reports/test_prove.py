"""The first difference between two runs is the one that made the others; digests of a state do not
depend on its cut.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from hfscale.checkpoint.manifest import write_file
from hfscale.checkpoint.store import serialize
from hfscale.dist.world import Place
from hfscale.engine.fragments import Fragment, share
from hfscale.reports.prove import COMPONENTS, LOGGED, digests, first_difference

TWIN = {
    step: {name: [f"{name} {step}"] for name in (COMPONENTS if step % 2 == 0 else LOGGED)}
    for step in range(1, 7)
}


@pytest.mark.parametrize(
    ("changes", "step", "component"),
    [
        ([(4, "loss", 0)], 4, "loss"),
        ([(4, "loss", 0), (4, "batch_digest", 0), (5, "lr", 0)], 4, "batch_digest"),
        ([(4, "exp_avg_sq", 0), (4, "exp_avg", 0), (5, "loss", 0)], 4, "exp_avg"),
        # the second time that it came there
        (
            [(3, "grad_norm", 1), (4, "weight", 0)],
            3,
            "grad_norm",
        ),
        ([(6, "position in the data", 0)], 6, "position in the data"),
    ],
)
def test_the_first_thing_that_differs_is_named(changes, step, component):
    other = copy.deepcopy(TWIN)
    # steps that are repeated are no difference
    other[3] = {name: values * 2 for name, values in other[3].items()}
    assert first_difference(TWIN, other) is None
    for at, name, attempt in changes:
        other[at][name][attempt] = "something else"
    found = first_difference(TWIN, other)
    assert (found["step"], found["component"]) == (step, component)
    assert found["twin"] == TWIN[step][component] and "something else" in found["resumed"]


def test_what_only_one_of_them_has_is_a_difference():
    for step, name in ((2, "weight"), (5, "loss")):
        less = copy.deepcopy(TWIN)
        del less[step][name]
        assert first_difference(TWIN, less) == {
            "step": step,
            "component": name,
            "twin": TWIN[step][name],
            "resumed": [],
        }
        assert first_difference(less, TWIN) == {
            "step": step,
            "component": name,
            "twin": [],
            "resumed": TWIN[step][name],
        }


def save(folder: Path, fragments: list[Fragment], world_size: int) -> dict[str, str]:
    for rank in range(world_size):
        write_file(
            folder,
            f"engine/rank-{rank:05}.safetensors",
            serialize(list(share(fragments, place=Place(rank, world_size)))),
        )
    return digests(folder)


def test_digests_tell_weights_and_moments_apart_and_ranks_together(tmp_path: Path):
    state = [
        Fragment(
            name,
            shape,
            0,
            {
                kind: torch.randn(torch.Size(shape).numel())
                for kind in ("weight", "exp_avg", "exp_avg_sq")
            },
        )
        for name, shape in {"b": (7, 5), "a": (), "c": (11,)}.items()
    ]
    first = save(tmp_path / "1", state, 1)
    assert save(tmp_path / "3", state[::-1], 3) == first
    state[2].tensors["exp_avg_sq"][10] += 1e-3
    changed = save(tmp_path / "changed", state, 2)
    assert {kind for kind in first if first[kind] != changed[kind]} == {"exp_avg_sq"}
