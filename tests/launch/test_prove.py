"""`hfscale prove resume`: equal for a run as it is, different for one with a planted fault, and
refused where it could prove nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.commands.prove import ranks_of
from tests.helpers.cli import ROOT, hfscale
from tests.helpers.corpus import run_values


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    values = run_values(
        corpus,
        tmp_path / "runs",
        "mine",
        train={"steps": 1000, "global_batch": 16, "micro_batch": 4},
    )
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_a_killed_run_becomes_its_twin(config: Path, tmp_path: Path):
    done = hfscale(
        "prove",
        "resume",
        config,
        "train.steps=null",
        "train.epochs=3",
        "--seed",
        5,
        "--out",
        tmp_path / "proof.json",
    )
    assert (
        "equal, bit for bit" in done.stderr
        and "train.steps=12" in done.stderr
        and "step  1/12" in done.stderr
    )
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert (proof["verdict"], proof["first_difference"]) == ("equal", None)
    assert list(proof["steps"]) == [str(step) for step in range(1, 13)]
    assert proof["steps"]["8"].keys() >= {
        "batch_digest",
        "lr",
        "loss",
        "weight",
        "exp_avg",
        "exp_avg_sq",
        "random state",
        "optimizer",
    }
    assert len(proof["kills"]) == 1 and all(4 <= kill["after_step"] < 12 for kill in proof["kills"])
    assert all(4 <= kill["resumed_at_step"] <= kill["after_step"] for kill in proof["kills"])
    assert proof["made"]["packages"]["torch"] and "train.epochs=3" in proof["command"]
    assert list((tmp_path / "runs").iterdir()) == [], "the runs are removed"


@pytest.mark.slow
def test_what_is_killed_is_a_rank(config: Path, tmp_path: Path):
    """And not one of the processes that copy its output, whose end nobody would notice."""
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "pretrain",
        str(config),
        "run.name=two",
        "--procs",
        "2",
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as launcher:
        try:
            until, log = time.monotonic() + 60, tmp_path / "runs/two/logs/rank-1.log"
            while len(ranks := ranks_of(launcher.pid)) < 2 or not log.exists():
                assert time.monotonic() < until and launcher.poll() is None
                time.sleep(0.05)
            environments = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ranks]
            assert [b"RANK=0" in environments[0], b"RANK=1" in environments[1], len(ranks)] == [
                True,
                True,
                2,
            ]
            os.kill(ranks[1], signal.SIGKILL)
            assert launcher.wait(timeout=60) == 128 + signal.SIGKILL
        finally:
            launcher.kill()


@pytest.mark.slow
def test_a_resume_that_forgets_a_moment_is_found_and_kept(config: Path, tmp_path: Path):
    path = f"{ROOT / 'tests/launch/forgetful'}:{ROOT}"
    done = hfscale(
        "prove",
        "resume",
        config,
        "train.steps=12",
        "checkpoint.every_steps=3",
        check=False,
        env={"PYTHONPATH": path},
    )
    assert done.returncode == 1, done.stderr
    [certificate] = (tmp_path / "runs").glob("*.json")
    proof, home = json.loads(certificate.read_text()), certificate.with_suffix("")
    first, [kill] = proof["first_difference"], proof["kills"]
    assert proof["verdict"] == "different" and first["step"] > kill["resumed_at_step"] >= 3
    assert (
        first["component"] in ("loss", "grad_norm", "weight") and first["twin"] != first["resumed"]
    )
    assert (home / "twin" / "checkpoints").is_dir() and (home / "killed" / "checkpoints").is_dir()
    assert f"both runs are kept in {home}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.steps=4", "checkpoint.every_steps=3"], "too few steps to kill a run 1 times"),
        (["checkpoint.every_steps=null"], "too few steps"),
        (["train.steps=20", "checkpoint.every_steps=4", "--kills", 16], "20 steps, saved every 4"),
        (["run.seeed=3"], "did you mean seed"),
    ],
)
def test_what_could_prove_nothing_is_refused(
    config: Path, tmp_path: Path, overrides: list[object], words: str
):
    done = hfscale("prove", "resume", config, *overrides, check=False)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_earlier_certificate_is_not_overwritten(config: Path, tmp_path: Path):
    (tmp_path / "proof.json").write_text("{}")
    done = hfscale("prove", "resume", config, "--out", tmp_path / "proof.json", check=False)
    assert done.returncode == 2 and "exists already; nothing was run" in done.stderr
    assert (tmp_path / "proof.json").read_text() == "{}" and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_that_cannot_start_proves_nothing(config: Path, tmp_path: Path):
    done = hfscale("prove", "resume", config, "tokenizer.path=./nothing", check=False)
    assert done.returncode == 2
    assert (
        "there is no tokenizer" in done.stderr
        and "ended by itself, so nothing is proven" in done.stderr
    )
    assert not list((tmp_path / "runs").glob("*.json"))
