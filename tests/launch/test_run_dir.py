"""A run directory is made once, goes on, refuses what contradicts it, and forgets nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfscale.checkpoint import layout
from hfscale.checkpoint.manifest import write_file, write_manifest
from hfscale.checkpoint.state import CheckpointState
from hfscale.config.load import load_config
from hfscale.config.schema import Checkpoint
from hfscale.errors import CheckpointError, ConfigError, UserError
from hfscale.run.run import Run
from hfscale.tokenizer import tokenizer_digest
from launch import run_dir
from launch.commands.evaluate import _kept
from launch.request import Request


def attempt(*overrides: str, source: str = "config.yaml") -> list[str]:
    loaded = Request(source, overrides).load()
    with run_dir.locked(loaded.config.run_dir):
        said = run_dir.compare(loaded.config)
        run_dir.record(loaded, launcher="local", procs=2)
    return said


def trained(folder: Path) -> Path:
    attempt()
    (folder / "runs/first/metrics.jsonl").write_text('{"step": 1}\n')
    return folder / "runs/first"


def test_a_new_run_records_what_made_it(folder: Path):
    assert attempt("optim.lr=1e-3") == []
    path = folder / "runs/first"
    assert (
        load_config(path / "config.yaml").config
        == Request("config.yaml", ("optim.lr=1e-3",)).load().config
    )
    [entry] = json.loads((path / "environment.json").read_text())
    assert entry["sources"]["optim.lr"] == "command line"
    assert entry["sources"]["run.name"] == "config.yaml:1"
    assert entry["packages"]["pydantic"]
    assert (entry["procs"], entry["changes"]) == (2, [])


def test_an_untrained_run_takes_any_config(folder: Path):
    attempt()
    assert attempt("run.seed=3", "data.seq_len=16") == []
    entries = json.loads((folder / "runs/first/environment.json").read_text())
    assert entries[1]["changes"] == ["run.seed: 17 -> 3", "data.seq_len: 32 -> 16"]


def test_a_trained_run_refuses_what_it_was_not_trained_with(folder: Path):
    path = trained(folder)
    before = (path / "config.yaml").read_text()
    (folder / "runs/first-2").mkdir()
    with pytest.raises(CheckpointError) as caught:
        attempt("run.seed=3", "data.seq_len=16", "optim.lr=1e-3")
    text = str(caught.value)
    assert "run.seed: 17 -> 3" in text
    assert "data.seq_len: 32 -> 16" in text
    assert "optim.lr" not in text
    assert "run.name=first-3" in text, "a name that is free"
    assert (path / "config.yaml").read_text() == before


def test_a_trained_run_goes_on_with_notices_and_keeps_the_old_values(folder: Path):
    path = trained(folder)
    [notice] = attempt("train.steps=20", "engine.zero_stage=3")
    assert "train.steps: 10 -> 20" in notice
    assert load_config(path / "config.yaml").config.engine.zero_stage == 3
    assert json.loads((path / "environment.json").read_text())[1]["changes"] == [
        "train.steps: 10 -> 20",
        "engine.zero_stage: 1 -> 3",
    ]


def test_another_optimizer_is_refused_before_ranks_start(folder: Path):
    saved = trained(folder) / "checkpoints/step-00000004"
    saved.mkdir(parents=True)
    state = CheckpointState(step=4, optimizer="lion").to_json()
    write_manifest(saved, [write_file(saved, layout.STATE, [state])], step=4)
    with pytest.raises(CheckpointError, match="another optimizer") as caught:
        attempt()
    assert "optim.reset=true" in caught.value.remedy
    assert attempt("optim.name=lion") and attempt("optim.reset=true")


def test_a_run_directory_is_a_config_and_may_be_moved(folder: Path):
    trained(folder)
    (folder / "runs").rename(folder / "elsewhere")
    assert attempt("train.steps=30", source="elsewhere/first") == [
        "the run goes on with train.steps: 10 -> 30"
    ]
    assert (
        load_config(folder / "elsewhere/first/config.yaml").config.run_dir
        == folder / "elsewhere/first"
    )
    assert not (folder / "runs").exists()


def test_a_moved_tokenizer_is_the_same_and_another_one_is_not(folder: Path):
    path = trained(folder)
    (folder / "tokenizer/tokenizer.json").write_text(
        '{"model": {"type": "BPE", "vocab": {"a": 0}}}'
    )
    entry = write_file(
        path / "checkpoints/step-00000001",
        "state.json",
        [
            json.dumps(
                {"step": 1, "tokenizer_digest": tokenizer_digest(folder / "tokenizer")}
            ).encode()
        ],
    )
    write_manifest(path / "checkpoints/step-00000001", [entry], step=1)
    (folder / "tokenizer").rename(folder / "moved")
    assert attempt("tokenizer.path=./moved") == []
    (folder / "moved/tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"b": 0}}}')
    (folder / "moved").rename(folder / "other")
    with pytest.raises(CheckpointError, match=r"tokenizer\.path: .*moved.* -> .*other"):
        attempt("tokenizer.path=./other")
    (folder / "other").rename(folder / "moved")
    with pytest.raises(
        CheckpointError, match=r"the tokenizer's digest: '[0-9a-f]+' -> '[0-9a-f]+'"
    ):
        attempt("tokenizer.path=./moved")  # in its place, but another one


def test_other_folders_are_left_alone(folder: Path):
    (folder / "runs/first").mkdir(parents=True)
    (folder / "runs/first/thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        attempt()
    with pytest.raises(CheckpointError, match="not a run directory"):
        Request("shards").load()
    (folder / "runs/file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        run_dir.compare(Request("config.yaml", ("run.name=file",)).load().config)
    with (
        pytest.raises(ConfigError, match="cannot make the run directory"),
        run_dir.locked(folder / "config.yaml/below"),
    ):
        pass


def test_an_attempt_that_was_killed_early_is_no_obstacle(folder: Path):
    attempt()
    (folder / "runs/first/config.yaml").unlink()
    assert attempt() == []


def test_one_at_a_time(folder: Path):
    path = folder / "runs/first"
    with (
        run_dir.locked(path),
        pytest.raises(CheckpointError, match="another job is at work"),
        run_dir.locked(path),
    ):
        pass
    with run_dir.locked(folder / "runs/first"):
        pass


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.sources.0.shards=nowhere",), "nowhere"),
        (("data.validation.shards=nowhere",), "nowhere"),
        (("tokenizer.path=./nothing",), "hfscale tokenizer train"),
        (("engine.precision=fp16",), "fp16 needs a GPU"),
        (("engine.offload=parameters",), "stage 3"),
        (("engine.extra={zero_optimization: {stage: 2}}",), "engine.extra"),
    ],
)
def test_what_can_be_known_before_is_checked_before(
    folder: Path, overrides: tuple[str, ...], words: str
):
    with pytest.raises(UserError, match=words):
        Run(Request("config.yaml", overrides).load().config).read(device_type="cpu")
    Run(Request("config.yaml").load().config).read(device_type="cpu")


@pytest.mark.parametrize(("code", "kept"), [(2, True), (1, False), (0, False), (75, False)])
def test_a_refused_attempt_leaves_the_run_its_config(folder: Path, code: int, kept: bool):
    path = trained(folder)
    before = (path / "config.yaml").read_bytes()
    there = run_dir.before_attempt(path)
    attempt("train.steps=99")
    run_dir.restore_if_refused(path, there, code=code)
    assert ((path / "config.yaml").read_bytes() == before) is kept
    there = run_dir.before_attempt(path)
    attempt("train.steps=100")
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n')
    run_dir.restore_if_refused(path, there, code=2)  # a mistake that shows after it has trained on
    assert load_config(path / "config.yaml").config.train.steps == 100


def test_only_runs_of_the_debug_launcher_are_made_anew(folder: Path):
    path = trained(folder)
    with pytest.raises(CheckpointError, match=r"not a run of the debug launcher[\s\S]*local"):
        run_dir.made_by_alone(path, launcher="debug")
    run_dir.made_by_alone(path, launcher="local")
    (path / "environment.json").write_text("[{")
    with pytest.raises(CheckpointError, match=r"damaged[\s\S]*environment.json"):
        run_dir.made_by_alone(path, launcher="local")


def test_missing_shards_are_named_before_ranks_start(folder: Path):
    (folder / "shards" / "shard-000000.idx").unlink()
    with pytest.raises(
        UserError, match=r"1 files of the shards are missing[\s\S]*shard-000000.idx"
    ):
        Run(Request("config.yaml").load().config).read(device_type="cpu")


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "environment.json", "logs/rank-1.log"])
def test_a_run_does_not_write_through_links(folder: Path, name: str):
    """A stranger's run directory would write to files of its new user."""
    (folder / "victim").write_text("mine")
    path = folder / "runs" / "first" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(folder / "victim")
    with (
        pytest.raises(CheckpointError, match="is a link"),
        run_dir.locked(folder / "runs" / "first"),
    ):
        pass
    assert (folder / "victim").read_text() == "mine"


def test_a_checkpoint_is_kept_while_it_is_scored(folder: Path):
    """`hfscale evaluate --all` beside a training that keeps one checkpoint."""
    checkpoints = folder / "runs/first/checkpoints"
    for step in (10, 20, 30):
        (checkpoints / layout.step_name(step)).mkdir(parents=True)
        (checkpoints / layout.step_name(step) / layout.MANIFEST).touch()
    policy = Checkpoint(keep_last=1)
    old, pinned = (checkpoints / layout.step_name(step) for step in (10, 20))
    layout.pin(checkpoints, 20, pinned=True)
    with _kept(old) as there:
        assert there
        assert layout.prune(checkpoints, policy) == []
    with _kept(pinned) as there:
        assert there
    assert layout.prune(checkpoints, policy) == [old], "a pin of the user's stays"
    with _kept(old) as there:
        assert not there, "pruned before it was its turn"
