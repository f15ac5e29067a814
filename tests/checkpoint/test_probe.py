"""Every kind of model leaves with the output that its engine had: decoders, encoders, and both
together, with a head or none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hfscale.checkpoint.export import compare_logits, write_weights
from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.probe import Probe, read_probe
from hfscale.checkpoint.state import CheckpointState
from hfscale.checkpoint.weights import open_weights
from hfscale.config.schema import Checkpoint
from hfscale.dist.world import Place
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
    checkpoints = CheckpointManager(folder, config=Checkpoint(), place=Place(engine.all.rank, 2))
    checkpoints.save(engine, CheckpointState(step=1))
    checkpoints.wait()
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "auto_model"),
    [
        ("bert", None),
        ("t5", None),
        ("bart", None),
        ("bert", "AutoModel"),
        ("bert", "AutoModelForSequenceClassification"),
        ("bert", "AutoModelForTokenClassification"),
        ("bert", "AutoModelForQuestionAnswering"),
        ("gpt2", "AutoModelForSequenceClassification"),
        ("bart", "AutoModelForSequenceClassification"),
    ],
)
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


def choices(folder: Path) -> tuple[list[int], bool]:
    """Save a model that takes (B, C, T), and return the shape that was asked and whether a bare
    model answers it alike.
    """
    torch.manual_seed(0)
    kind = transformers.BertForMultipleChoice
    config = transformers.BertConfig(vocab_size=VOCAB, **FAMILIES["bert"][1].config)
    engine = Engine.create(
        kind(config), config=tiny_config(3, world_size=1), device=torch.device("cpu")
    )
    inputs = {"input_ids": torch.randint(VOCAB, (1, 3, 8))}
    checkpoints = CheckpointManager(folder, config=Checkpoint(), place=Place())
    checkpoints.save(engine, CheckpointState(step=1), probe_inputs=inputs)
    checkpoints.wait()
    engine.close()
    probe, other = read_probe(folder / "step-00000001"), kind(config).eval()
    load = open_weights(folder / "step-00000001")
    with torch.no_grad():
        for name, weight in other.named_parameters():
            weight.copy_(load.read(name))
        answer = probe.ask(other, device=torch.device("cpu"))
    assert answer is not None
    return list(probe.inputs["input_ids"].shape), torch.allclose(answer, probe.logits, atol=1e-6)


@pytest.mark.slow
def test_the_inputs_are_those_that_the_model_takes(tmp_path: Path) -> None:
    assert run_ranks(choices, 1, tmp_path) == [([1, 3, 8], True)]


def test_a_probe_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Its file has the ids of one row of text, and nothing else that went in."""
    model = build("t5", None, 1).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits.flatten()
    kept = logits[torch.linspace(0, len(logits) - 1, 512, dtype=torch.float64).long()]
    save_file({"ids": ids, "logits": kept}, tmp_path / "probe.safetensors")
    probe = read_probe(tmp_path)
    with torch.no_grad():
        answer = probe.ask(model, device=torch.device("cpu"))
    assert answer is not None and torch.allclose(answer, probe.logits, atol=1e-6)
