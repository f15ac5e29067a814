"""The debug launcher: tiny, in the foreground, in a directory of its own, with a debugger where it
breaks.
"""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hfscale.config.load import load_config
from launch.debug import tiny
from launch.request import Request
from tests.helpers.cli import ROOT, hfscale

BROKEN = """
import sys
from hfscale import log, worker
from launch import debug
from launch.job import Training
from launch.request import Request
def run(file):
    clue = "found" + "it"
    raise RuntimeError("broken")
worker.run = run
log.setup()
sys.exit(debug.launch(Training(Request("config.yaml"))))
"""


def test_tiny_values_give_way_to_the_command_line(folder: Path):
    request = Request("config.yaml", ("train.steps=50", "optim.lr=1e-3", "metrics.every_steps=7"))
    config = request.load(tiny(request.load(), on_gpu=False)).config
    assert (config.train.steps, config.optim.lr, config.metrics.every_steps) == (50, 1e-3, 7)
    assert config.model.config == {"n_layer": 2, "n_head": 2, "n_embd": 16}
    assert (config.train.global_batch, config.train.micro_batch) == (4, 2)
    assert config.run_dir == folder / "runs/first-debug"


def test_any_length_and_precision_becomes_tiny(folder: Path):
    (folder / "long.yaml").write_text(
        "extends: config.yaml\ntrain: {steps: null, tokens: 1e12, global_batch: 9, "
        "micro_batch: 3}\n"
        "engine: {precision: fp16, compile: true}\n"
    )
    request = Request("long.yaml")
    config = request.load(tiny(request.load(), on_gpu=False)).config
    assert (config.train.steps, config.train.tokens) == (6, None)
    assert config.train.global_batch % config.train.micro_batch == 0
    assert (config.engine.precision, config.engine.compile) == ("fp32", False)
    again = Request("config.yaml", ("run.name=first-debug",))
    assert again.load(tiny(again.load(), on_gpu=False)).config.run.name == "first-debug"


def test_an_error_opens_the_debugger_on_a_terminal_only(folder: Path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", BROKEN]
    done = subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "RuntimeError: broken" in done.stderr
    assert "(Pdb)" not in done.stdout

    ours, theirs = pty.openpty()
    os.write(ours, b"p clue\nquit\n")
    done = subprocess.run(
        command, cwd=folder, env=env, stdin=theirs, capture_output=True, text=True, timeout=60
    )
    os.close(ours), os.close(theirs)
    assert done.returncode == 1
    assert "(Pdb)" in done.stdout
    assert "'foundit'" in done.stdout


@pytest.mark.slow
def test_a_debug_run_trains_and_starts_afresh_each_time(corpus: Path, tmp_path: Path):
    for name in ("tokenizer", "shards"):
        shutil.copytree(corpus / name, tmp_path / name)
    (tmp_path / "llama.yaml").write_text(
        f"extends: {ROOT / 'configs/debug/tiny_llama.yaml'}\ntokenizer: {{path: tokenizer}}\n"
        "data: {sources: [{shards: shards/train}], validation: {shards: shards/validation}}\n"
    )
    for _ in range(2):
        done = hfscale(
            "pretrain", "llama.yaml", "data.seq_len=32", "--launcher", "debug", cwd=tmp_path
        )
        assert "step 6/6" in done.stderr
        assert "done: this config trains" in done.stderr
    assert "replacing the earlier debug run" in done.stderr
    assert f"run directory {tmp_path / 'runs' / 'tiny-llama-debug'}" in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny-llama-debug"]
    assert load_config(tmp_path / "runs/tiny-llama-debug/config.yaml").config.engine.zero_stage == 3
    asked = ["pretrain", "llama.yaml", "data.seq_len=32", "run.root=llama.yaml"]
    dry = hfscale(*asked, "--launcher", "debug", "--dry-run", cwd=tmp_path, check=False)
    assert dry.returncode == 2 and "llama.yaml is no folder" in dry.stderr, dry.stderr
