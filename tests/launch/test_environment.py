"""What an attempt leaves on record is enough to make it again: the code with its changes, the
command, the data, and equal losses.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.environment import code
from tests.helpers.cli import ROOT, hfscale
from tests.helpers.corpus import run_values


def git(*arguments: object, cwd: Path) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.autocrlf=false")
    return subprocess.run(
        ["git", *who, *map(str, arguments)], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and ".git" not in file.parts
    }


def test_commit_and_patch_give_the_code_that_ran(tmp_path: Path):
    outer, run = tmp_path / "outer", tmp_path / "run"
    root = outer / "vendor" / "hfscale"  # a checkout may lie in a larger one
    (root / "launch").mkdir(parents=True)
    (root / "hfscale").mkdir()
    run.mkdir()
    (root / "launch" / "cli.py").write_text("old = 1\n")
    (root / "hfscale" / "gone.py").write_text("x\n")
    (root / "hfscale" / "binary").write_bytes(b"\0\1")
    (outer / "other").write_text("not ours")
    git("init", "-q", cwd=outer)
    assert code(root, run) == {"revision": None, "patch": None}, (
        "nothing of it is committed: not its checkout"
    )
    git("add", ".", cwd=outer)
    git("commit", "-qm", "all", cwd=outer)
    head = git("rev-parse", "HEAD", cwd=outer).strip()
    assert code(root, run) == {"revision": head, "patch": None}
    assert list(run.iterdir()) == []

    (root / "launch" / "cli.py").write_text("new = 2  # 你好\n")
    (root / "hfscale" / "gone.py").unlink()
    (root / "hfscale" / "new file.py").write_text("y\n")
    (root / "hfscale" / "binary").write_bytes(b"\0\2")
    (outer / "other").write_text("changed, and not ours")
    found = code(root, run)
    assert found["revision"] == head
    git("clone", "-q", outer, tmp_path / "again", cwd=tmp_path)
    again = tmp_path / "again" / "vendor" / "hfscale"
    git("apply", "--directory", "vendor/hfscale", run / found["patch"], cwd=tmp_path / "again")
    assert tree(again) == tree(root)
    assert code(root, run) == found
    assert [file.name for file in run.iterdir()] == [found["patch"]], (
        "the same changes are kept once"
    )


def test_the_patch_is_of_our_code_alone(tmp_path: Path):
    """slurm/site.sh, where docs send tokens and proxies, does not end in a run directory that
    others read.
    """
    for name in ("launch/cli.py", "slurm/site.sh", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git("init", "-q", cwd=tmp_path)
    git("add", ".", cwd=tmp_path)
    git("commit", "-qm", "all", cwd=tmp_path)
    (tmp_path / "slurm" / "site.sh").write_text("export HF_TOKEN=SECRET\n")
    (tmp_path / "README.md").write_text("SECRET\n")
    assert code(tmp_path, tmp_path)["patch"] is None
    (tmp_path / "launch" / "cli.py").write_text("2\n")
    patch = (tmp_path / code(tmp_path, tmp_path)["patch"]).read_text()
    assert "launch/cli.py" in patch and "SECRET" not in patch


def test_a_patch_beyond_the_limit_is_named_and_not_kept(tmp_path: Path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "cli.py").write_text("1\n")
    git("init", "-q", cwd=tmp_path)
    git("add", ".", cwd=tmp_path)
    git("commit", "-qm", "all", cwd=tmp_path)
    (tmp_path / "launch" / "large.txt").write_text("0123456789abcde\n" * (2**20 + 1))
    assert code(tmp_path, tmp_path)["patch"].startswith("not kept: 1")
    assert not list(tmp_path.glob("*.patch"))


def losses(run: Path) -> list[tuple[int, float, int]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"], line["batch_digest"]) for line in map(json.loads, lines)]


@pytest.mark.slow
def test_the_recorded_command_or_config_run_again_gives_the_same_losses(
    corpus: Path, tmp_path: Path
):
    values = run_values(
        corpus,
        tmp_path / "runs",
        "first",
        train={"steps": 4, "global_batch": 8, "micro_batch": 2},
        data={
            "seq_len": 32,
            "sources": [
                {"name": name, "shards": str(corpus / "shards" / name)}
                for name in ("train", "validation")
            ],
        },
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run = tmp_path / "runs" / "first"
    hfscale("pretrain", "run.yaml", "optim.lr=5e-3", "--procs", 2, cwd=tmp_path)
    [entry] = attempts = json.loads((run / "environment.json").read_text())

    assert entry["packages"]["torch"] == version("torch") and len(entry["packages"]) > 20
    assert entry["ranks"] == [f"{entry['host']}: cpu"] * 2 and entry["driver"] is None
    assert entry["sources"]["optim.lr"] == "command line" and entry["sources"]["train"]
    state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert set(entry["data"]) == {"train", "validation"} and entry["data"] == state["data"]
    assert entry["tokenizer_digest"] == state["tokenizer_digest"]
    if git("rev-parse", "--is-inside-work-tree", cwd=ROOT).strip() == "true":
        assert entry["code"]["revision"] == git("rev-parse", "HEAD", cwd=ROOT).strip()

    # a resume adds its entry and changes no other
    hfscale("pretrain", run, "train.steps=6", "--procs", 1, cwd=tmp_path)
    assert json.loads((run / "environment.json").read_text())[:1] == attempts
    assert [
        len(entry["ranks"]) for entry in json.loads((run / "environment.json").read_text())
    ] == [2, 1]

    command = [sys.executable, *entry["command"], "run.name=again"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run(
        command, cwd=entry["cwd"], check=True, env=environment, capture_output=True, timeout=120
    )
    shutil.copy(run / "config.yaml", tmp_path / "recorded.yaml")
    hfscale(
        "pretrain",
        tmp_path / "recorded.yaml",
        "run.name=third",
        "train.steps=4",
        "--procs",
        entry["procs"],
    )
    first = losses(run)[:4]
    assert losses(tmp_path / "runs" / "again") == first
    assert losses(tmp_path / "runs" / "third") == first


def worker_starts_again(run: Path) -> Any:
    import torch

    from hfscale.dist.world import World
    from hfscale.jobs.environment import record_ranks

    record_ranks(
        run, World.from_environment(), torch.device("cpu"), described={"tokenizer_digest": "t"}
    )
    record_ranks(
        run, World.from_environment(), torch.device("cpu"), described={"tokenizer_digest": "t"}
    )
    return (
        json.loads((run / "environment.json").read_text())
        if World.from_environment().all.rank == 0
        else None
    )


def test_ranks_that_are_started_again_without_a_launcher_add_an_entry(tmp_path: Path):
    from tests.helpers.ranks import run_ranks

    (tmp_path / "environment.json").write_text('[{"command": ["hfscale"]}]')
    first, second = run_ranks(worker_starts_again, 2, tmp_path)[0]
    assert first["command"] == ["hfscale"] and "command" not in second
    assert first["ranks"] == second["ranks"] and len(second["ranks"]) == 2
