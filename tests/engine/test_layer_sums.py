"""Norms by layer are the same at every ZeRO stage, those of plain torch, and cost no number."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from transformers import AutoConfig

from hfscale.engine.groups import layer_names
from hfscale.engine.layer_sums import SAMPLE
from tests.engine.tiny import full_state, tiny_config, tiny_engine, tiny_model, train_step
from tests.helpers.ranks import run_ranks
from tests.models.families import FAMILIES

LAYERS = ["embeddings", "layers.0", "layers.1", "head"]


def measured(stage: int, precision: str, measure: bool) -> object:
    """Return losses, the sums of the last step over all ranks, and the weights before and after
    it.
    """
    world_size = torch.distributed.get_world_size()
    config = tiny_config(stage, precision, world_size=world_size)
    engine = tiny_engine(config)
    engine.step = partial(engine.step, measure=measure)  # type: ignore[method-assign]
    losses, before = [], {}
    for step in (1, 2, 3):
        before = full_state(engine)
        losses.append(train_step(engine, config, step)[0])
    sums = engine.layer_sums().double()
    torch.distributed.all_reduce(sums)
    result = (losses, engine.layers, sums, before, full_state(engine))
    engine.close()
    return result


def weights(state: dict[str, dict[str, torch.Tensor]], layer: str) -> torch.Tensor:
    """Return the weights of one layer of a full state, end to end."""
    names = layer_names(tiny_model())
    return torch.cat(
        [state[name]["weight"].flatten() for name, of in sorted(names.items()) if of == layer]
    )


@pytest.fixture(scope="module")
def alone():
    return run_ranks(measured, 1, 0, "fp32", True)[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sums_are_those_of_the_whole_model(alone, stage):
    [(_, layers, sums, before, after), _] = run_ranks(measured, 2, stage, "fp32", True)
    assert layers == LAYERS
    assert max(param.numel() for param in tiny_model().parameters()) <= SAMPLE, "all is sampled"
    for layer, (update, weight) in zip(layers, sums[1:].T.tolist(), strict=True):
        now = weights(after, layer).double()
        assert weight == pytest.approx(now.square().sum().item(), rel=1e-4)
        moved = (now - weights(before, layer)).square().sum().item()
        assert update == pytest.approx(moved, rel=1e-3)
    # what was measured is the clipped gradient, as the whole model's norm says
    assert sums[0].sum().sqrt().item() == pytest.approx(0.5, rel=1e-3)
    torch.testing.assert_close(sums, alone[2], rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("stage", [1, 3])
def test_measuring_changes_no_number(stage):
    quiet, watched = (run_ranks(measured, 2, stage, "bf16", on)[0] for on in (False, True))
    assert watched[0] == quiet[0]
    for name, tensors in quiet[4].items():
        for key, values in tensors.items():
            assert torch.equal(watched[4][name][key], values)


def test_gradients_by_layer_are_those_of_torch():
    """Of the first step, by hand."""
    [whole] = run_ranks(by_hand, 1)
    [(_, _, sums, _, _)] = run_ranks(first_step, 1)
    total = sum(whole.values())
    for layer, gradient in zip(LAYERS, sums[0].tolist(), strict=True):
        assert gradient / sums[0].sum().item() == pytest.approx(whole[layer] / total, rel=1e-3)


def first_step() -> object:
    config = tiny_config(0, "fp32", accumulation=1)
    engine = tiny_engine(config)
    engine.step = partial(engine.step, measure=True)  # type: ignore[method-assign]
    train_step(engine, config, 1)
    result = (None, None, engine.layer_sums().double(), None, None)
    engine.close()
    return result


def by_hand() -> dict[str, float]:
    """Return the squares of the gradient of the first step, by layer, with plain torch."""
    import torch.nn.functional as F

    from tests.engine.tiny import rows

    model, (ids, counted) = tiny_model(), rows(1)
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    asked = counted[:, 1:].flatten()
    ((losses * asked).sum() / asked.sum()).backward()
    squares = dict.fromkeys(LAYERS, 0.0)
    for name, param in model.named_parameters():
        squares[layer_names(model)[name]] += param.grad.square().sum().item()
    return squares


def test_layers_have_names_that_people_use():
    def named(family: str) -> list[str]:
        auto_model, model_config = FAMILIES[family]
        built = AutoConfig.for_model(model_config.architecture, **model_config.config)
        model = getattr(transformers, auto_model).from_config(built)
        return [*dict.fromkeys(layer_names(model).values())]

    assert named("bert") == ["embeddings", "layers.0", "layers.1", "head"]
    assert named("t5") == ["embeddings", "encoder.0", "encoder.1", "head", "decoder.0", "decoder.1"]
