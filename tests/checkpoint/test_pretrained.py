"""Pretrained weights under other names, from other heads, with other vocabularies, at every ZeRO
stage.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
)

from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.pretrained import Match, labels_of, load_pretrained, match, tell
from hfscale.checkpoint.state import CheckpointState
from hfscale.checkpoint.weights import WeightsReader, open_weights
from hfscale.config.schema import Checkpoint
from hfscale.dist.world import Place
from hfscale.engine.engine import Engine
from hfscale.engine.start import construction, gathered
from hfscale.errors import CheckpointError
from hfscale.models.build import build_model
from tests.engine.tiny import full_state, tiny_config, tiny_engine, train_step
from tests.helpers.ranks import run_ranks
from tests.models.families import FAMILIES, VOCAB


class DictReader(WeightsReader):
    """Weights from a dict: the reader's contract, without a file."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def names(self) -> list[str]:
        return list(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weights[name].shape)

    def read_slice(self, name: str, *, start: int, numel: int) -> Tensor:
        return self.weights[name].reshape(-1)[start : start + numel]


def build(family: str, seed: int, vocab_size: int = VOCAB) -> Any:
    auto_model, model = FAMILIES[family]
    return build_model(model, auto_model=auto_model, vocab_size=vocab_size, seq_len=32, seed=seed)


def loaded(
    model: nn.Module, weights: dict[str, Tensor], stage: int = 0
) -> tuple[Match, dict[str, Tensor]]:
    """Return what matched and the model's tensors, whole, once ``weights`` are in an engine of this
    stage.
    """
    engine = Engine.create(
        model,
        config=tiny_config(stage, world_size=torch.distributed.get_world_size()),
        device=torch.device("cpu"),
    )
    found = tell(match(engine.module, DictReader(weights)), engine.module)
    load_pretrained(engine, DictReader(weights), found)
    # the weights that the engine computes with, not only those it updates
    with gathered(engine.module.parameters()):
        live = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    state = {name: tensors["weight"] for name, tensors in full_state(engine).items()}
    engine.close()
    assert all(torch.equal(live[name].flatten(), state[name]) for name in live)
    return found, state


def own_weights(family: str, stage: int) -> list[str]:
    """Return the names of tensors that are not those of another model of the family, whose weights
    were loaded.
    """
    auto_model, model = FAMILIES[family]
    source = build(family, 1)
    # each tied parameter once
    weights = {name: p.detach() for name, p in source.named_parameters()}
    weights |= {
        name: torch.linspace(0, 1, b.numel()).view(b.shape)
        for name, b in source.named_buffers()
        if name in source.state_dict()
    }
    partitioned = build_model(
        model,
        auto_model=auto_model,
        vocab_size=VOCAB,
        seq_len=32,
        seed=2,
        gather=lambda params: gathered(params, modify=True),
        context=lambda: construction(tiny_config(stage, world_size=2), device_type="cpu"),
    )
    found, state = loaded(partitioned, weights, stage)
    assert not found.missing and not found.unexpected
    assert state.keys() == weights.keys()
    return [name for name, want in weights.items() if not torch.equal(state[name], want.flatten())]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_own_weights_come_back(family: str) -> None:
    for stage in (0, 3):
        assert run_ranks(own_weights, 2, family, stage) == [[], []]


def one(model: nn.Module, weights: dict[str, Tensor]) -> tuple[Match, dict[str, Tensor]]:
    return run_ranks(loaded, 1, model, weights)[0]


def test_a_headless_model_fills_all_but_the_head(caplog: pytest.LogCaptureFixture) -> None:
    source, model = AutoModel.from_config(build("bert", 1).config), build("bert", 2)
    head = model.cls.predictions.transform.dense.weight.flatten().clone()
    found, state = one(model, source.state_dict())
    want = source.encoder.layer[1].output.dense.weight.flatten()
    assert torch.equal(state["bert.encoder.layer.1.output.dense.weight"], want)
    assert torch.equal(state["cls.predictions.transform.dense.weight"], head)
    assert found.missing and all(name.startswith("cls.") for name in found.missing)
    assert found.unexpected == ("pooler.dense.bias", "pooler.dense.weight")
    logging.getLogger("hfscale").propagate = True
    tell(match(model, DictReader(source.state_dict())), model)
    assert (
        "start fresh: cls.predictions.bias" in caplog.text
        and "no place in the model and are not read: pooler.dense" in caplog.text
    )


def test_a_whole_model_fills_a_headless_one() -> None:
    source = build("gpt2", 1)
    _, state = one(GPT2Model(source.config), source.state_dict())
    assert torch.equal(state["wte.weight"], source.transformer.wte.weight.flatten())


def test_old_names_of_layer_norms() -> None:
    source, model = build("bert", 1), build("bert", 2)
    assert isinstance(source, BertForMaskedLM)
    nn.init.normal_(source.bert.embeddings.LayerNorm.weight)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in source.state_dict().items()
    }
    found, state = one(model, old)
    assert not found.missing
    assert torch.equal(
        state["bert.embeddings.LayerNorm.weight"], source.bert.embeddings.LayerNorm.weight
    )


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    model = build("gpt2", 1)
    with pytest.raises(
        CheckpointError, match=r"transformer.wpe.weight: \[64, 32\], there \[64, 10\]"
    ):
        match(model, DictReader({"wpe.weight": torch.zeros(64, 10)}))
    with pytest.raises(
        CheckpointError, match=r"transformer.wte.weight: \[320, 32\], there \[400, 32\]"
    ):
        match(model, DictReader({"wte.weight": torch.zeros(400, 32)}))
    with pytest.raises(CheckpointError, match="none of"):
        match(model, DictReader({"vision.patch": torch.zeros(3)}))
    untied = dict(model.state_dict()) | {"lm_head.weight": torch.zeros(320, 32)}
    with pytest.raises(
        CheckpointError, match=r"ties transformer.wte.weight and lm_head.weight, which differ"
    ):
        match(model, DictReader(untied))


def grown(family: str, stage: int) -> list[str]:
    """Return the names of tensors that are wrong after a model of 256 ids was loaded into one of
    320.
    """
    source = build(family, 1, vocab_size=256)
    weights = {name: p.detach() for name, p in source.named_parameters()}
    # not zero, so that a mean means something
    for name in (
        "lm_head.weight",
        "cls.predictions.bias",
    ):
        if name in weights:
            nn.init.normal_(weights[name], generator=torch.Generator().manual_seed(7))
    found, state = loaded(build(family, 2), weights, stage)
    assert not found.missing and not found.unexpected and found.rows == (256, VOCAB)
    wrong = []
    for name, want in weights.items():
        if name in found.grown:
            want = torch.cat(
                [want, want.double().mean(0, keepdim=True).float().expand(64, *want.shape[1:])]
            )
        wrong += [] if torch.allclose(state[name], want.flatten(), atol=1e-7) else [name]
    assert found.grown, "nothing grew"
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_larger_vocabulary_gets_rows_that_are_the_mean(family: str) -> None:
    for stage in (0, 3):
        assert run_ranks(grown, 2, family, stage) == [[], []]


def trained(folder: Path) -> torch.Tensor:
    config = tiny_config(3, "bf16", world_size=2)
    engine = tiny_engine(config)
    train_step(engine, config, 1)
    checkpoints = CheckpointManager(folder, config=Checkpoint(), place=Place(engine.all.rank, 2))
    checkpoints.save(engine, CheckpointState(step=1))
    checkpoints.wait()
    state = full_state(engine)
    engine.close()
    return {name: tensors["weight"] for name, tensors in state.items()}  # type: ignore[return-value]


def taken(folder: Path, stage: int, precision: str) -> dict[str, Tensor]:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    )
    engine = Engine.create(
        model, config=tiny_config(stage, precision, world_size=2), device=torch.device("cpu")
    )
    reader = open_weights(folder)
    load_pretrained(engine, reader, match(engine.module, reader))
    state = {name: tensors["weight"] for name, tensors in full_state(engine).items()}
    engine.close()
    return state


@pytest.mark.slow
def test_the_fp32_weights_of_a_checkpoint_are_not_rounded_on_the_way(tmp_path: Path) -> None:
    want = run_ranks(trained, 2, tmp_path)[0]
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in want.values())
    for stage, precision in ((1, "bf16"), (3, "bf16"), (0, "fp32")):
        got = run_ranks(taken, 2, tmp_path / "step-00000001", stage, precision)[0]
        assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize(
    ("there", "here", "fresh"),
    [
        (["neg", "pos"], ["neg", "pos"], False),
        (["neg", "pos"], ["ham", "spam"], True),
        (["neg", "pos"], ["pos", "neg"], True),
        (["neg", "pos"], ["0", "1"], False),
        ([], ["neg", "pos"], False),
        (["LABEL_0", "LABEL_1"], ["neg", "pos"], False),
    ],
)
def test_a_head_with_other_names_for_its_labels_starts_fresh(
    tmp_path: Path, there: list[str], here: list[str], fresh: bool
) -> None:
    config = BertConfig(
        id2label=dict(enumerate(here)),
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"id2label": dict(enumerate(there))} if there else {})
    )
    model = BertForSequenceClassification(config)
    found = match(model, DictReader(dict(model.state_dict())), labels=labels_of(tmp_path))
    assert found.missing == (("classifier.weight", "classifier.bias") if fresh else ())


def test_the_head_of_another_set_of_labels_starts_fresh(caplog: pytest.LogCaptureFixture) -> None:
    small = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    five, two = (
        BertForSequenceClassification(BertConfig(num_labels=labels, **small)) for labels in (5, 2)
    )
    found = tell(match(two, DictReader(dict(five.state_dict()))), two)
    assert (
        found.missing == ("classifier.weight", "classifier.bias")
        and "start fresh: classifier.weight" in caplog.text
    )
    with pytest.raises(CheckpointError, match="do not fit"):
        match(two, DictReader({**five.state_dict(), "bert.pooler.dense.weight": torch.zeros(9, 8)}))


def test_new_ids_that_are_never_trained_are_named(caplog: pytest.LogCaptureFixture) -> None:
    source, model = build("gpt2", 1), build("gpt2", 2, VOCAB + 3)
    logging.getLogger("hfscale").propagate = True
    found = match(model, DictReader(source.state_dict()))
    tell(found, model)
    assert "are frozen" not in caplog.text
    model.requires_grad_(False)
    tell(found, model)
    assert "so these 3 tokens keep the mean and are never learned" in caplog.text
