"""A run that stopped on 4 ranks goes on, without a command, on any other number and at any other
ZeRO stage: state, data and losses.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.reports.prove import digests
from tests.helpers.cli import hfscale
from tests.helpers.corpus import GPT2, run_values
from tests.helpers.forks import Forks

pytestmark = pytest.mark.slow
SAVED = {  # engine of the run that stops on 4 ranks -> (world size, engine) of those that go on
    "0 fp32": [(1, "1 fp32"), (6, "3 fp32")],
    "1 fp32 optimizer": [(3, "2 fp32"), (2, "0 fp32")],
    "2 bf16": [(8, "1 bf16"), (2, "3 bf16 optimizer"), (1, "2 bf16 optimizer")],
    "3 fp32": [(3, "0 fp32"), (8, "2 fp32"), (1, "3 fp32 optimizer")],
    "3 bf16 optimizer": [(6, "1 bf16"), (2, "2 bf16")],
}


def live_digests(engine: Any) -> dict[str, str]:
    """Return the digests of what an engine holds, made as ``digests`` makes them of a checkpoint,
    from its live tensors.
    """
    from tests.engine.tiny import full_state

    state, found = (
        full_state(engine),
        {kind: hashlib.sha256() for kind in ("weight", "exp_avg", "exp_avg_sq")},
    )
    shapes = {
        name: list(getattr(tensor, "ds_shape", tensor.shape))
        for name, tensor in (*engine.module.named_parameters(), *engine.module.named_buffers())
    }
    for name in sorted(state):
        for kind, tensor in state[name].items():
            found[kind].update(f"{name}{shapes[name]}".encode() + tensor.numpy().tobytes())
    return {kind: digest.hexdigest() for kind, digest in found.items()}


def go_on(values: dict[str, Any]) -> dict[str, Any]:
    """Run on every rank: build the trainer, which loads what is there, then train to the end."""
    import torch

    from hfscale.config.schema import RunConfig
    from hfscale.dist.world import World
    from hfscale.run.run import Run

    torch.set_num_threads(1)
    config = RunConfig.model_validate(values)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Run(config, World.from_environment()).live(torch.device("cpu"))
    found = {
        "start": trainer.state.step,
        "state": live_digests(trainer.engine),
        "adam_step": trainer.engine.scalars()["adam_step"],
    }
    trainer.run()
    trainer.close()
    return found


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks") / "errors") as running:
        yield running


def config(
    corpus: Path, root: Path, name: str, engine: str, **sections: dict[str, Any]
) -> dict[str, Any]:
    stage, precision, offload = (*engine.split(), "none")[:3]
    return run_values(
        corpus,
        root,
        name,
        engine={"zero_stage": int(stage), "precision": precision, "offload": offload},
        train={"steps": 4, "global_batch": 24, "micro_batch": 1},
        model={
            **GPT2,
            "config": {**GPT2["config"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        },
        checkpoint={"every_steps": 2, "keep_last": 9, "every_minutes": None},
        **sections,
    )


def records(run: Path) -> dict[int, dict[str, Any]]:
    return {
        line["step"]: line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }


@pytest.mark.parametrize("saved", SAVED)
def test_any_size_and_stage_goes_on_with_the_same_state_and_the_next_rows(
    corpus: Path, tmp_path: Path, forks: Forks, saved: str
):
    forks.run(go_on, 4, config(corpus, tmp_path, "first", saved))
    whole, checkpoint = (
        records(tmp_path / "first"),
        tmp_path / "first" / "checkpoints" / "step-00000002",
    )
    for number, (world_size, engine) in enumerate(SAVED[saved]):
        run = tmp_path / str(number)
        shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
        found = forks.run(go_on, world_size, config(corpus, tmp_path, run.name, engine))
        assert (found["start"], found["adam_step"]) == (2, 2), (saved, world_size, engine)
        assert found["state"] == digests(checkpoint), (saved, world_size, engine)
        parts = records(run)
        assert sorted(parts) == [3, 4]
        for step, part in parts.items():
            # the same global batch: each row exactly once
            for exact in (
                "batch_digest",
                "tokens_seen",
                "lr",
            ):
                assert part[exact] == whole[step][exact], (saved, world_size, engine, exact)
            assert part["loss"] == pytest.approx(
                whole[step]["loss"], abs=1e-5 if "fp32" in saved else 2e-2
            )


def test_an_impossible_size_is_refused_with_the_nearest_ones_and_a_possible_one_is_solved_anew(
    corpus: Path, tmp_path: Path, forks: Forks
):
    values = config(
        corpus, tmp_path / "runs", "run", "1 fp32", metrics={"every_steps": 1, "tensorboard": False}
    )
    forks.run(go_on, 4, values)
    (tmp_path / "runs" / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    refused = hfscale(
        "pretrain", tmp_path / "runs" / "run", "train.steps=5", "--procs", 5, check=False
    )
    assert refused.returncode == 2
    assert "world_size 4 or 6" in refused.stderr and "cannot be cut" in refused.stderr
    again = hfscale("pretrain", tmp_path / "runs" / "run", "train.steps=5", "--procs", 3)
    assert (
        "micro_batch 1 x accumulation 8 x world_size 3" in again.stderr
        and "resumed at step 4 of 5" in again.stderr
    )
    assert "saved on 4 ranks at ZeRO 1: " in again.stderr
    assert "peak memory of this rank 0." in again.stderr
    assert records(tmp_path / "runs" / "run")[5]["tokens_seen"] == 5 * 24 * 32
