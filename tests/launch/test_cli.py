"""The command as a user types it: quick help, clear refusals, no traceback."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from launch.cli import VERBS
from tests.helpers.cli import hfscale


def test_help_lists_what_works():
    # its time is benchmarks/startup.py's; that it loads nothing slow, tests/test_house.py's
    text = hfscale("--help").stdout
    assert [verb for verb in VERBS if verb not in text] == []


def test_short_help_and_version():
    assert hfscale("show", "-h").stdout == hfscale("show", "--help").stdout
    assert hfscale("--version").stdout.startswith("hfscale ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_there(verb: str):
    assert "Usage: hfscale" in hfscale(verb, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretain", "x"], "did you mean pretrain"),
        (["pretrain", "nowhere.yaml"], "did you mean config.yaml"),
        (["pretrain", "config.yaml", "train.stepz=3"], "did you mean steps"),
        (["pretrain", "config.yaml", "--launcher", "loca"], "did you mean local"),
        (["pretrain", "config.yaml", "--procs", "3"], "train.global_batch=6 or 12"),
        (["pretrain", "config.yaml", "engine.precision=fp16"], "fp16 needs a GPU"),
        (["pretrain", "config.yaml", "data.sources.0.shards=nowhere"], "nowhere"),
        (["pretrain", "shards"], "not a run directory"),
        (["show", "config.yaml", "run.name=a/b"], "run.name"),
        (["checkpoints", "nowhere"], "no such run"),
    ],
)
def test_mistakes_are_one_screen_and_exit_code_2(folder: Path, arguments: list[str], words: str):
    done = hfscale(*arguments, cwd=folder, check=False)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") < 25
    assert not (folder / "runs").exists(), "a refused run leaves nothing behind"


def test_a_port_in_use_is_refused(folder: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = hfscale(
            "pretrain", "config.yaml", "--port", taken.getsockname()[1], cwd=folder, check=False
        )
    assert done.returncode == 2
    assert "the port cannot be used" in done.stderr


def test_show_gives_values_sources_and_derived_numbers(folder: Path):
    text = hfscale(
        "show",
        "config.yaml",
        "train.steps=null",
        "train.epochs=2",
        "schedule.warmup_steps=5",
        "--procs",
        2,
        cwd=folder,
    ).stdout
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["schedule.warmup_steps"] == ["5", "command", "line"]
    assert rows["data.seq_len"] == ["32", "config.yaml:3"]
    assert rows["optim.lr"] == ["0.0003", "default"]
    assert "world_size 2" in text
    assert rows["steps"] == ["31"], "two epochs of (4000 - 1) // 32 = 124 rows, 8 a step"
    assert "run directory" in text


def test_show_prints_a_schema(folder: Path):
    assert "train" in json.loads(hfscale("show", "--schema", cwd=folder).stdout)["properties"]
