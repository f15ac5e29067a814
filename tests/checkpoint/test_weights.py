"""One reader for runs, checkpoints and transformers folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.probe import read_probe
from hfscale.checkpoint.state import CheckpointState
from hfscale.checkpoint.weights import open_weights
from hfscale.config.schema import Checkpoint
from hfscale.dist.world import Place
from hfscale.errors import CheckpointError
from tests.engine.tiny import full_state, tiny_config, tiny_engine, tiny_model, train_step
from tests.helpers.ranks import run_ranks


def saved_run(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    """Return the weights of a run whose checkpoint of step 2 is now in ``folder``."""
    config = tiny_config(stage, "bf16", world_size=2)
    engine = tiny_engine(config)
    checkpoints = CheckpointManager(
        folder / "checkpoints", config=Checkpoint(), place=Place(engine.all.rank, 2)
    )
    for step in (1, 2):
        train_step(engine, config, step)
    checkpoints.save(engine, CheckpointState(step=2))
    checkpoints.wait()
    weights = {name: tensors["weight"] for name, tensors in full_state(engine).items()}
    engine.close()
    return weights


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_gives_its_fp32_weights_and_with_them_the_engines_logits(tmp_path, stage):
    weights = run_ranks(saved_run, 2, tmp_path, stage)[0]
    for path in (tmp_path, tmp_path / "checkpoints/step-00000002"):
        reader = open_weights(path)
        assert set(reader.names()) == {*weights, "lm_head.weight"}
        for name, want in weights.items():
            assert (
                torch.equal(reader.read(name).flatten(), want)
                and reader.read(name).dtype == torch.float32
            )
            assert torch.equal(reader.read_slice(name, start=3, numel=9), want[3:12])
        assert torch.equal(reader.read("lm_head.weight"), reader.read("transformer.wte.weight"))
        assert reader.shape("lm_head.weight") == (97, 24)
    model = tiny_model()
    model.load_state_dict({name: reader.read(name) for name in reader.names()})
    probe = read_probe(tmp_path / "checkpoints/step-00000002")
    with torch.no_grad():
        got = probe.ask(model.to(torch.bfloat16).eval(), device=torch.device("cpu"))
    assert got is not None and torch.equal(got, probe.logits)


def test_damage_is_found_before_anything_is_read(tmp_path):
    run_ranks(saved_run, 2, tmp_path, 2)
    path = tmp_path / "checkpoints/step-00000002/engine/rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"damaged(.|\n)*rank-00001"):
        open_weights(tmp_path)


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_a_transformers_folder_whole_and_in_pieces(tmp_path, shard):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    reader = open_weights(str(tmp_path))
    state = model.state_dict()
    assert set(reader.names()) == set(state) - {"lm_head.weight"}
    for name in reader.names():
        want = state[name]
        assert reader.shape(name) == tuple(want.shape) and torch.equal(reader.read(name), want)
        for start, numel in ((0, 1), (5, 7), (want.numel() - 3, 3)):
            assert torch.equal(
                reader.read_slice(name, start=start, numel=numel),
                want.flatten()[start : start + numel],
            ), (name, start)


def test_what_has_no_weights_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        open_weights(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no safetensors"):
        open_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_weights(tmp_path / "nothing")
