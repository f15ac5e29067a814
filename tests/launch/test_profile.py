"""A profile changes no number, and can be asked of a run that is under way."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.cli import ROOT, hfscale, listen_to_ctrl_c
from tests.helpers.corpus import run_values
from tests.helpers.slurm import wait_for

pytestmark = pytest.mark.slow


def losses(run: Path) -> list[tuple[float, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


def operators(trace: Path) -> set[str]:
    with gzip.open(trace) as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def test_profiles_that_are_planned_and_asked_for(corpus: Path, tmp_path: Path):
    config = tmp_path / "config.yaml"
    train = {"steps": 8, "global_batch": 8, "micro_batch": 2}
    config.write_text(yaml.safe_dump(run_values(corpus, tmp_path, "plain", train=train)))
    hfscale("pretrain", config, "--procs", 2)
    plan = ["run.name=run", "metrics.profile.at_step=3", "metrics.profile.steps=2"]
    hfscale("pretrain", config, *plan, "metrics.profile.every_rank=true", "--procs", 2)
    ended = ["run.name=ended", "metrics.profile.at_step=8", "metrics.profile.steps=9"]
    told = hfscale("pretrain", config, *ended, "--procs", 1).stderr
    assert "profile of 1 steps from step 8 on, of 9 that were asked for: the run ended" in told
    assert (tmp_path / "ended/profiles/attempt-1-step-8/rank-0.txt").is_file()
    run = tmp_path / "run"
    assert losses(run) == losses(tmp_path / "plain")
    for rank in (0, 1):
        folder = run / "profiles" / "attempt-1-step-3"
        trace = operators(folder / f"rank-{rank}.pt.trace.json.gz")
        assert {"aten::mm", "aten::embedding"} <= trace
        table = (folder / f"rank-{rank}.txt").read_text().splitlines()
        assert len(table) == 2 + 10 and any(line.startswith("aten::") for line in table)
        flops = (folder / f"rank-{rank}-flops.txt").read_text()
        assert "GPT2LMHeadModel" in flops and "fwd flops" in flops

    refused = hfscale("profile", run, check=False)
    assert refused.returncode == 2 and "this run is not under way" in refused.stderr
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["pretrain", str(run), "train.steps=1000000", "--procs", "2"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words],
        env=environment,
        stderr=subprocess.DEVNULL,
        preexec_fn=listen_to_ctrl_c,
    )
    wait_for(lambda: len(losses(run)) > 9 or launcher.poll() is not None, timeout_s=300)
    asked = hfscale("profile", run, "--steps", 1)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(120) == 75
    assert "attempt-2-step-" in asked.stdout and "operator" in asked.stdout
    [folder] = (run / "profiles").glob("attempt-2-*")
    assert not (folder / "rank-1.txt").exists(), "rank 0 alone was asked"


def test_the_first_step_is_none_to_profile(corpus: Path, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_values(corpus, tmp_path, "run")))
    refused = hfscale("pretrain", config, "metrics.profile.at_step=1", check=False)
    assert refused.returncode == 2
    assert "metrics.profile.at_step" in refused.stderr and "2" in refused.stderr
