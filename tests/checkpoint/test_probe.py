"""Every kind of model leaves with the output that its engine had: decoders, encoders, and both together, with a head or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hfscale.checkpoint.export import compare_logits, write_weights
from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.probe import Probe, read_probe
from hfscale.checkpoint.weights import open_weights
from hfscale.config.schema import Checkpoint
from hfscale.engine.engine import Engine
from hfscale.errors import CheckpointError
from hfscale.models.build import build_model
from tests.engine.tiny import tiny_config
from tests.helpers.ranks import run_ranks
from tests.models.families import FAMILIES, VOCAB


def build(family: str, auto_model: str | None, seed: int) -> Any:
    own, model = FAMILIES[family]
    return build_model(model, auto_model=auto_model or own, vocab_size=VOCAB, seq_len=32, seed=seed)


def save(folder: Path, family: str, auto_model: str | None) -> None:
    engine = Engine.create(
        build(family, auto_model, 1),
        config=tiny_config(3, world_size=2),
        device=torch.device("cpu"),
    )
    checkpoints = CheckpointManager(folder, config=Checkpoint(), rank=engine.rank, world_size=2)
    checkpoints.save(engine, {"step": 1}, step=1)
    checkpoints.wait()
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "auto_model"), [
    ("bert", None), ("t5", None), ("bart", None), ("bert", "AutoModel"), ("bert", "AutoModelForSequenceClassification"),
    ("bert", "AutoModelForTokenClassification"), ("bert", "AutoModelForQuestionAnswering"), ("gpt2", "AutoModelForSequenceClassification"),
    ("bart", "AutoModelForSequenceClassification")])  # fmt: skip
def test_an_exported_model_of_any_kind_gives_the_engines_output(
    tmp_path: Path, family: str, auto_model: str | None
) -> None:
    run_ranks(save, 2, tmp_path, family, auto_model)
    checkpoint, out, other = (
        tmp_path / "step-00000001",
        tmp_path / "out",
        build(family, auto_model, 2),
    )
    out.mkdir()
    write_weights(open_weights(checkpoint), other, out)
    other.config.save_pretrained(out)
    model = getattr(transformers, auto_model or FAMILIES[family][0]).from_pretrained(out).eval()
    probe = read_probe(checkpoint)
    with torch.no_grad():
        got, wrong = (probe.ask(m, device=torch.device("cpu")) for m in (model, other.eval()))
    assert got is not None and wrong is not None
    assert compare_logits(got, probe.logits, tolerance=1e-5) <= 1e-5
    with pytest.raises(CheckpointError, match="does not give the run's logits"):
        compare_logits(wrong, probe.logits, tolerance=1e-3)


def test_a_probe_that_ends_with_padding_does_not_make_transformers_warn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, said = build("gpt2", "AutoModelForSequenceClassification", 1).eval(), list[str]()
    model.config.pad_token_id = 2
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning_once", said.append)
    assert (
        Probe({"ids": torch.tensor([[5, 6, 2]])}).ask(model, device=torch.device("cpu")) is not None
    )
    assert not said
