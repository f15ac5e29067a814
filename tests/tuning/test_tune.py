"""`hfscale tune` on real ranks: memory that ends a trial and nothing else, a rate that diverges,
and children that end with the command.
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

from hfscale.errors import CheckpointError, ConfigError
from launch.commands.tune import tune
from launch.trials import Trials
from launch.tuning import Tuning
from tests.helpers.cli import ROOT, hfscale, listen_to_ctrl_c
from tests.helpers.corpus import run_values

# a row's scores of attention take some 120 MiB, in tensors of 32 MiB: from that size on glibc gives
# them back as soon as they are freed, so that what is resident is what is held
WIDE = {
    "architecture": "gpt2",
    "config": {"n_layer": 1, "n_embd": 32, "n_head": 8, "n_positions": 1024},
    "attention": "eager",
}


def write_config(corpus: Path, folder: Path, **sections: dict[str, object]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(run_values(corpus, folder / "runs", "run", **sections)))
    return path


@pytest.mark.slow
def test_the_largest_micro_batch_in_a_limit_that_only_two_rows_fit_in(corpus: Path, tmp_path: Path):
    path = write_config(
        corpus,
        tmp_path,
        model=WIDE,
        data={"seq_len": 1024, "sources": [{"shards": str(corpus / "shards" / "train")}]},
        train={"steps": 100, "global_batch": 4, "micro_batch": 1},
    )
    home = tmp_path / "scratch"
    home.mkdir()
    trials = Trials(str(path), [], procs=1, memory_gib=0.0, home=home)
    tuning = Tuning(trials, steps=3)
    assert tuning.fits(2, {})
    [peak] = tuning.peaks.values()
    assert peak
    trials.memory_gib = peak + 0.12
    assert tuning.largest({}) == 2
    assert list(tuning.peaks.values()) == [peak, None], "four rows were tried, and did not fit"
    assert not (tmp_path / "runs").exists(), "nothing of the user's is touched"


@pytest.mark.slow
def test_an_absurd_rate_diverges_and_a_good_one_is_suggested(corpus: Path, tmp_path: Path):
    path = write_config(corpus, tmp_path, optim={"lr": 1.0})
    png = tmp_path / "lr.png"
    words = ["--only", "lr", "--steps", 4, "--procs", 2, "--json", "--png", png]
    (tmp_path / "scratch").mkdir()
    done = hfscale("tune", path, *words, env={"TMPDIR": str(tmp_path / "scratch")})
    report = json.loads(done.stdout)
    found = report["parts"]["lr"]
    assert 1e-3 < found["diverged"] < 1e3, found
    assert found["rates"][0] == pytest.approx(1e-3)
    assert report["chosen"]["optim.lr"] <= found["diverged"] / 10 * 1.05
    assert report["config"] == [f"optim: {{lr: {report['chosen']['optim.lr']}}}"]
    assert png.is_file()
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.yaml", "lr.png", "scratch"}
    assert list((tmp_path / "scratch").glob("hfscale*")) == []


@pytest.mark.slow
def test_ctrl_c_ends_the_trial_and_its_ranks(corpus: Path, tmp_path: Path):
    path = write_config(corpus, tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "tune", path, "--only", "lr", "--steps", "1000"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=listen_to_ctrl_c,
    ) as command:
        until = time.monotonic() + 60
        while len(with_words("hfscale.tuning.trial", str(scratch))) < 2:
            assert time.monotonic() < until, "no rank has started"
            time.sleep(0.05)
        command.send_signal(signal.SIGINT)
        assert command.wait(30) == 130
    time.sleep(0.5)
    assert with_words(str(scratch)) == []
    assert list(scratch.glob("hfscale*")) == []


def with_words(*words: str) -> list[str]:
    """Return the command lines of processes in which all ``words`` stand."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if all(word in line for word in words):
            lines.append(line)
    return lines


def test_a_trial_that_fails_says_why(corpus: Path, tmp_path: Path):
    path = write_config(corpus, tmp_path)
    trials = Trials(str(path), [], procs=1, memory_gib=0.0, home=tmp_path)
    with pytest.raises(CheckpointError, match="there is no tokenizer") as failed:
        trials.run({"tokenizer.path": str(tmp_path / "nowhere")}, steps=3)
    assert "--launcher debug" in failed.value.remedy


def test_what_cannot_be_tuned_is_refused_at_once(corpus: Path, tmp_path: Path):
    path = str(write_config(corpus, tmp_path))
    with pytest.raises(ConfigError, match="nothing of this name") as refused:
        tune(path, only="microbatch")
    assert "micro-batch" in refused.value.remedy
    with pytest.raises(ConfigError, match="nothing is to be tuned"):
        tune(path, only=" ,")
    with pytest.raises(ConfigError, match="folder that is not there"):
        tune(path, only="lr", png=tmp_path / "nowhere" / "a.png")
    with pytest.raises(ConfigError, match="cannot be cut"):
        tune(path, only="lr", procs=3, steps=3)
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        tune(path, ["tokenizer.path=./nowhere"], only="lr", procs=1, steps=3)
