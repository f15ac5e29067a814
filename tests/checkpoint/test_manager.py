"""Saves and loads with the real engine on real ranks, across processes, sizes, stages and
damage.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hfscale.checkpoint import layout
from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.manifest import verify
from hfscale.checkpoint.probe import read_probe
from hfscale.checkpoint.state import CheckpointState
from hfscale.checkpoint.store import FragmentReader
from hfscale.config.schema import Checkpoint
from hfscale.dist.world import Place
from hfscale.errors import CheckpointError, UnhealthyError
from tests.engine.tiny import full_state, logits, same, tiny_config, tiny_engine, train_step
from tests.helpers.needs import lacking
from tests.helpers.ranks import run_ranks

STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")


def manager(folder: Path, **options: Any) -> CheckpointManager:
    config = Checkpoint.model_validate({"every_minutes": None, **options})
    group = torch.distributed
    return CheckpointManager(
        folder, config=config, place=Place(group.get_rank(), group.get_world_size())
    )


def train_and_save(
    folder: Path,
    stage: int,
    precision: str = "fp32",
    *,
    save_at: tuple[int, ...] = (3,),
    steps: int = 6,
    dropout: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """Train from the newest checkpoint of ``folder`` (or the start) to ``steps``, saving on the
    way; tell what happened.
    """
    config = tiny_config(stage, precision, world_size=torch.distributed.get_world_size())
    engine, checkpoints = tiny_engine(config, dropout), manager(folder, **options)
    logits(engine)  # a run probes its model before it loads
    loaded = checkpoints.load_latest(engine)
    start = loaded.step if loaded else 0
    at_start, seen = full_state(engine), logits(engine)
    losses, states = {}, {}
    for step in range(start + 1, steps + 1):
        losses[step] = train_step(engine, config, step)[0]
        if step in save_at:
            checkpoints.save(engine, CheckpointState(step=step, note="kept"))
            states[step] = full_state(engine)  # while the writer works
    checkpoints.wait()
    result = {
        "start": start,
        "loaded": loaded,
        "at_start": at_start,
        "logits": seen,
        "losses": losses,
        "states": states,
        "end": full_state(engine),
        "scalars": engine.scalars(),
    }
    engine.close()
    return result


def each(folder: Path, cases: list[str], **options: Any) -> dict[str, dict[str, Any]]:
    return {
        case: train_and_save(folder / case, int(case[0]), case[2:], **options) for case in cases
    }


def timed_saves(folder: Path) -> dict[str, list[float]]:
    engine = tiny_engine(tiny_config(1, "fp32", world_size=1), 0.0)
    times = {}
    for name, behind in (("behind", True), ("inside", False)):
        checkpoints = manager(folder / name, **{"async": behind})
        assert checkpoints.save_s == 0
        checkpoints.save(engine, CheckpointState(step=1))
        checkpoints.wait()
        times[name] = [checkpoints.save_s, checkpoints.stall_s, checkpoints.write_s]
    engine.close()
    return times


def test_a_save_counts_its_writing_once(tmp_path: Path):
    [times] = run_ranks(timed_saves, 1, tmp_path)
    whole, stall, written = times["behind"]
    assert whole == stall + written
    whole, stall, written = times["inside"]
    assert whole == stall >= written > 0  # training waited for the writing


@pytest.mark.slow
def test_train_6_is_train_3_and_resume_3_and_again_in_new_processes(tmp_path):
    # tests/jobs/test_exact_resume.py has all of them, through the command line
    cases = [
        "1-bf16",
        "3-fp32",
    ]
    options = {"dropout": 0.1, "save_at": (3,), "steps": 6}
    straight = run_ranks(each, 2, tmp_path, cases, **options)[0]
    # 3 -> 6, saves 5
    resumed = run_ranks(each, 2, tmp_path, cases, fresh=True, **{**options, "save_at": (5,)})[0]
    again = run_ranks(each, 2, tmp_path, cases, fresh=True, **options)[0]  # 5 -> 6
    for case, first in straight.items():
        for other, start in ((resumed[case], 3), (again[case], 5)):
            assert other["start"] == start and other["loaded"].note == "kept"
            assert same(other["end"], first["end"]) == [], case
            assert other["losses"] == {
                step: loss for step, loss in first["losses"].items() if step > start
            }, case
            assert other["scalars"] == first["scalars"] == {"adam_step": 6, "loss_scaler": None}
        assert same(resumed[case]["at_start"], first["states"][3]) == [], case


@pytest.mark.slow
def test_every_stage_and_size_loads_what_any_other_saved(tmp_path):
    saved = {}
    for number, (stage, size, precision) in enumerate(
        [(1, 2, "fp32"), (3, 1, "fp32"), (0, 2, "fp32"), (2, 2, "bf16"), (3, 2, "bf16")]
    ):
        folder = tmp_path / str(number)
        saved[folder] = (
            precision,
            run_ranks(train_and_save, size, folder, stage, precision, steps=3)[0],
        )
    for folder, (precision, first) in saved.items():
        seen = []
        for stage, size in ((0, 1), (1, 1), (2, 2), (3, 2), (0, 2), (3, 1)):
            loaded = run_ranks(train_and_save, size, folder, stage, precision, save_at=(), steps=4)[
                0
            ]
            assert loaded["start"] == 3 and same(loaded["at_start"], first["end"]) == [], (
                folder.name,
                stage,
                size,
            )
            seen.append((loaded["logits"], loaded["losses"][4]))
        assert all(
            torch.equal(a[0], b[0]) and a[1] == pytest.approx(b[1], abs=1e-5)
            for a, b in pairwise(seen)
        )


def test_what_a_checkpoint_holds(tmp_path):
    result = run_ranks(train_and_save, 2, tmp_path, 1, steps=3)[0]
    (checkpoint,) = layout.committed(tmp_path)
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {
        "engine/rank-00000.safetensors",
        "engine/rank-00001.safetensors",
        "state.json",
        "config.json",
        "generation_config.json",
        "probe.safetensors",
        "manifest.json",
    }
    assert verify(checkpoint) == [] and [path.name for path in tmp_path.iterdir()] == [
        "step-00000003"
    ]
    probe = read_probe(checkpoint)
    assert (
        probe.logits.shape == (512,)
        and probe.logits.isfinite().all()
        and probe.inputs["input_ids"].shape == (1, 16)
    )
    assert len(result["end"]) == 28


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))


DAMAGE = {
    "a flipped byte": (
        lambda at: flip(at / "engine/rank-00001.safetensors"),
        "engine/rank-00001.safetensors",
    ),
    "cut short": (
        lambda at: (at / "engine/rank-00000.safetensors").write_bytes(b"x" * 100),
        "engine/rank-00000.safetensors",
    ),
    "a file gone": (lambda at: (at / "state.json").unlink(), "state.json"),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), "manifest.json"),
    "an edited manifest": (lambda at: edit(at / "manifest.json"), "manifest.json"),
    "an unreadable manifest": (lambda at: (at / "manifest.json").write_text("{"), "manifest.json"),
    "a file of another checkpoint": (
        lambda at: shutil.copy(
            at.with_name("step-00000002") / "engine/rank-00001.safetensors",
            at / "engine/rank-00002.safetensors",
        ),
        "engine/rank-00002.safetensors",
    ),
    "half copied": (lambda at: shutil.rmtree(at / "engine"), "engine/rank-00000.safetensors"),
    "under another name": (lambda at: at.rename(at.with_name("step-00000009")), "manifest.json"),
}


def test_damage_is_found_named_kept_and_not_loaded(tmp_path):
    good = run_ranks(train_and_save, 2, tmp_path / "run", 2, save_at=(2, 3), steps=3)[0]
    for number, (kind, (damage, file)) in enumerate(DAMAGE.items()):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "run", folder)
        # as DeepSpeed leaves it, and pointing nowhere: nobody asks it
        (folder / "latest").write_text("global_step99")
        damage(folder / "step-00000003")
        newest = layout.candidates(folder)[-1]
        assert any(file in problem for problem in verify(newest)), kind
        loaded = run_ranks(train_and_save, 2, folder, 2, save_at=(), steps=2)[0]
        assert loaded["start"] == 2 and same(loaded["at_start"], good["states"][2]) == [], kind
        assert [path.name for path in (folder / "rejected").iterdir()] == [newest.name], kind
        assert [path.name for path in layout.candidates(folder)] == ["step-00000002"]


def attempt(folder: Path, stage: int = 1, **options: Any) -> str:
    try:
        train_and_save(folder, stage, **options)
    except CheckpointError as error:
        return str(error)
    return ""


def test_when_none_is_intact_the_run_says_so_and_the_next_starts_over(tmp_path):
    run_ranks(train_and_save, 2, tmp_path, 1, steps=3)
    flip(tmp_path / "step-00000003/engine/rank-00000.safetensors")
    for message in run_ranks(attempt, 2, tmp_path):
        assert "no checkpoint of this run is intact" in message and "step 0" in message
    assert run_ranks(train_and_save, 2, tmp_path, 1, save_at=(), steps=1)[0]["start"] == 0


def write_another_model(folder: Path) -> str:
    config = tiny_config(1, world_size=2)
    from transformers import GPT2Config, GPT2LMHeadModel

    from hfscale.engine.engine import Engine

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97,
            n_positions=16,
            n_embd=24,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    engine = Engine.create(model, config=config, device=torch.device("cpu"))
    before = full_state(engine)
    manager(folder).save(engine, CheckpointState(step=1))
    checkpoints = manager(folder)
    torch.distributed.barrier()
    while not layout.committed(folder):
        pass
    engine.close()
    other = tiny_engine(config)  # with two layers
    untouched = full_state(other)
    try:
        checkpoints.load_latest(other)
    except CheckpointError as error:
        assert same(untouched, full_state(other)) == [] and before
        return str(error)
    finally:
        other.close()
    return ""


def test_another_model_is_refused_before_anything_is_loaded(tmp_path):
    for message in run_ranks(write_another_model, 2, tmp_path):
        assert "another model" in message and "transformer.h.1" in message
    assert layout.committed(tmp_path), "it is not damaged, so it stays"


def ruined(folder: Path) -> str:
    engine = tiny_engine(tiny_config(1, world_size=2))
    for fragment in engine.fragments(owned=False):
        fragment.tensors["weight"].fill_(float("inf"))
    engine.after_load()
    try:
        manager(folder).save(engine, CheckpointState(step=1))
    except UnhealthyError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def test_a_model_that_computes_no_numbers_is_not_saved(tmp_path):
    for message in run_ranks(ruined, 2, tmp_path):
        assert "logits are not finite; nothing was saved" in message
    assert list(tmp_path.iterdir()) == []


def limited(folder: Path, limit_on: int) -> list[str]:
    """Save at step 1; then let one rank's writer hit a file size limit, as on a full disk or
    quota.
    """
    config = tiny_config(1, world_size=2)
    engine, checkpoints = tiny_engine(config), manager(folder)
    train_step(engine, config, 1)
    checkpoints.save(engine, CheckpointState(step=1))
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []
    try:
        if engine.all.rank == limit_on:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        checkpoints.save(engine, CheckpointState(step=2))
        for _ in range(2):  # it stays failed
            with pytest.raises(CheckpointError) as error:
                checkpoints.wait()
            messages.append(str(error.value))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    messages.append(str(checkpoints.failed()))
    engine.close()
    return messages


@pytest.mark.parametrize("limit_on", [0, 1])
def test_a_write_that_fails_fails_every_rank_and_leaves_the_previous_checkpoint(tmp_path, limit_on):
    ranks = run_ranks(limited, 2, tmp_path, limit_on)
    assert all(
        "older ones are untouched" in message for messages in ranks for message in messages[:2]
    )
    assert "File too large" in ranks[limit_on][2]
    assert [path.name for path in layout.committed(tmp_path)] == ["step-00000001"]
    # and goes on
    assert run_ranks(train_and_save, 2, tmp_path, 1, save_at=(2,), steps=2)[0]["start"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_full_disk_is_seen_before_the_save(tmp_path):
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", tmp_path], capture_output=True
        ).returncode
        == 0
    )
    if not mounted:
        lacking("mounting a small disk needs root")
    try:
        for message in run_ranks(attempt, 2, tmp_path / "run", steps=3):
            assert "bytes needed" in message and "bytes free" in message
        assert layout.candidates(tmp_path / "run") == []
    finally:
        run_ranks(attempt, 2, tmp_path / "elsewhere", steps=0)  # no rank holds a file there
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_old_checkpoints_go_and_permanent_ones_stay(tmp_path):
    run_ranks(
        train_and_save,
        2,
        tmp_path,
        1,
        save_at=tuple(range(1, 8)),
        steps=7,
        keep_last=2,
        keep_every_steps=3,
    )
    assert [layout.step_of(path) for path in layout.committed(tmp_path)] == [3, 6, 7]


class SlowDisk(CheckpointManager):
    """Its writers wait for a gate before they begin."""

    gate = threading.Event()

    def _write(self, **kwargs: Any) -> None:
        self.gate.wait()
        super()._write(**kwargs)


def two_saves(folder: Path) -> dict[str, Any]:
    config = tiny_config(1, world_size=2)
    engine, checkpoints = (
        tiny_engine(config),
        SlowDisk(folder, config=Checkpoint(), place=Place(torch.distributed.get_rank(), 2)),
    )
    SlowDisk.gate.clear()
    train_step(engine, config, 1)
    checkpoints.save(engine, CheckpointState(step=1))
    at_first = full_state(engine)
    train_step(engine, config, 2)  # while nothing is written
    committed = len(layout.committed(folder))
    threading.Timer(0.5, SlowDisk.gate.set).start()
    # one set of buffers: it has to wait for the first
    checkpoints.save(engine, CheckpointState(step=2))
    there = [path.name for path in layout.committed(folder)]
    checkpoints.wait()
    reader = FragmentReader(folder / "step-00000001")
    wrong = [
        name
        for name, tensors in at_first.items()
        for kind, want in tensors.items()
        if not torch.equal(reader.read(name, kind, start=0, out=torch.empty_like(want)), want)
    ]
    reader.close()
    engine.close()
    return {"committed": committed, "there": there, "wrong": wrong}


def test_training_goes_on_behind_a_slow_disk_and_the_next_save_waits(tmp_path, caplog):
    for rank in run_ranks(two_saves, 2, tmp_path):
        assert rank["committed"] == 0
        assert rank["there"][0] == "step-00000001", (
            "the first is committed before the second has its snapshot"
        )
        assert rank["wrong"] == [], "what was trained meanwhile is not in it"
    assert [path.name for path in layout.committed(tmp_path)] == ["step-00000001", "step-00000002"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rank_0_decides_by_steps_and_by_the_clock(tmp_path):
    clock = Clock()
    config = Checkpoint(every_steps=100, every_minutes=2, keep_every_steps=70)
    rank0, rank1 = (
        CheckpointManager(tmp_path, config=config, place=Place(rank, 2), clock=clock)
        for rank in (0, 1)
    )
    assert [step for step in range(1, 211) if rank0.due(step)] == [70, 100, 140, 200, 210]
    clock.now = 119.0
    assert not rank0.due(1)
    clock.now = 120.0
    assert rank0.due(1) and not rank1.due(1) and not rank1.due(100)
