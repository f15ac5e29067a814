"""What the debug launcher makes of a config; that it trains is tested with the jobs."""
from __future__ import annotations

from pathlib import Path

from launch.debug import tiny
from launch.request import Request


def test_tiny_values_give_way_to_the_command_line(folder: Path):
    request = Request("config.yaml", ("train.steps=50", "optim.lr=1e-3", "metrics.every_steps=7"))
    config = request.load(tiny(request.load(), on_gpu=False)).config
    assert (config.train.steps, config.optim.lr, config.metrics.every_steps) == (50, 1e-3, 7)
    assert config.model.config == {"n_layer": 2, "n_head": 2, "n_embd": 16}
    assert (config.train.global_batch, config.train.micro_batch) == (4, 2)
    assert config.run_dir == folder / "runs/first-debug"


def test_any_length_and_precision_becomes_tiny(folder: Path):
    (folder / "long.yaml").write_text("extends: config.yaml\ntrain: {steps: null, tokens: 1e12, global_batch: 9, micro_batch: 3}\n"
                                      "engine: {precision: fp16, compile: true}\n")
    request = Request("long.yaml")
    config = request.load(tiny(request.load(), on_gpu=False)).config
    assert (config.train.steps, config.train.tokens) == (6, None)
    assert config.train.global_batch % config.train.micro_batch == 0
    assert (config.engine.precision, config.engine.compile) == ("fp32", False)
    again = Request("config.yaml", ("run.name=first-debug",))
    assert again.load(tiny(again.load(), on_gpu=False)).config.run.name == "first-debug"
