"""Scores and predictions by jobs of a real cluster, over two nodes: what one process makes, also
where Slurm's signal stops them in the middle.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from hfscale.config import permission
from hfscale.config.inference import ShardsConfig
from hfscale.config.load import to_yaml
from hfscale.errors import CheckpointError, ConfigError
from hfscale.monitor.fence import attempts
from hfscale.tokenizer import load_tokenizer
from launch.commands.evaluate import evaluate
from launch.commands.predict import predict
from launch.job import open_job
from tests.helpers.cli import ROOT, hfscale
from tests.helpers.slurm import Cluster, wait_for

EXAMPLES = 1100  # three chunks
TASK = "feature_extraction"
TWO_NODES = ["cluster.nodes=2", "cluster.allow_local_disk=true"]
SMALL = ["cluster.sbatch.oversubscribe=true", "cluster.sbatch.mem=100"]


@pytest.fixture
def model(corpus: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model, and texts; this process reaches the cluster."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tokenizer = load_tokenizer(str(corpus / "tokenizer"))
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 16, "n_positions": 64}
    folder = tmp_path / "gpt"
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [json.dumps({"text": f"text {number % 7} of {number}"}) for number in range(EXAMPLES)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def job_of(folder: Path) -> str:
    return (folder / "job").read_text().strip()


@pytest.mark.slow
def test_two_nodes_make_what_one_process_makes(
    model: str,
    corpus: Path,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    shards, table = str(corpus / "shards" / "validation"), str(tmp_path / "texts.jsonl")
    out = {way: tmp_path / f"{way}.jsonl" for way in ("alone", "slurm", "submitit")}
    overrides = [*TWO_NODES, *SMALL]

    def predicted(way: str) -> None:
        asked = overrides if way != "alone" else []
        launcher = way if way != "alone" else "local"
        predict(model, asked, TASK, table, out[way], launcher=launcher)

    def evaluated(folder: str, launcher: str, asked: list[str]) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        evaluate(model, asked, data=[shards], launcher=launcher)

    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}/tests/launch/faults:{ROOT}")
        patch.setenv("PASS_S", "0.2")
        predicted("slurm")
    told = capsys.readouterr().out
    parts = {way: path.with_name(f".{path.name}.parts") for way, path in out.items()}
    assert f"result        {out['slurm']}" in told
    assert f"hfscale logs {parts['slurm']} -f" in told
    predicted("submitit")
    evaluated("two nodes", "slurm", overrides)
    assert "scores.json" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="another Slurm job holds"):
        evaluated("two nodes", "local", [])
    [scores] = (tmp_path / "two nodes" / "evaluations").glob("shards/*")
    jobs = {"slurm": job_of(parts["slurm"]), "evaluate": job_of(scores)}

    predicted("alone")
    evaluated("one process", "local", [])
    wait_for(
        lambda: any(parts["slurm"].glob("0*.jsonl")) or out["slurm"].exists(),
        timeout_s=120,
        what=lambda: cluster.output(jobs["slurm"]),
    )
    cluster.run("scancel", "--signal=USR1", jobs["slurm"])
    for job in jobs.values():
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert cluster.job(jobs["slurm"])["Restarts"] == "1", cluster.output(jobs["slurm"])
    assert "stopped and saved; back into the queue" in cluster.output(jobs["slurm"])
    wait_for(out["submitit"].exists, timeout_s=120)
    assert out["slurm"].read_bytes() == out["alone"].read_bytes()
    assert out["submitit"].read_bytes() == out["alone"].read_bytes()
    ends = [attempt.ended() for attempt in attempts(parts["slurm"])]
    assert ends == [75, 0]
    assert (scores / "logs" / "rank-1.log").is_file()
    [alone] = (tmp_path / "one process" / "evaluations").glob("shards/*")
    assert alone.name == scores.name
    one, two = (json.loads((home / "scores.json").read_text()) for home in (alone, scores))
    assert two == one | {"scores": pytest.approx(one["scores"], rel=1e-6)} | {
        "intervals": two["intervals"]
    }

    capsys.readouterr()
    evaluated("two nodes", "slurm", overrides)
    assert "perplexity" in capsys.readouterr().out, "it was found"
    predicted("slurm")
    assert f"1,100 predictions in {out['slurm']}" in capsys.readouterr().out
    assert "0 parts" not in hfscale("status", parts["slurm"]).stdout


REFUSALS = {
    "another head": ({"task": "fill_mask"}, [], "no AutoModelForMaskedLM"),
    "a setting of stage 3": ({}, ["engine.zero_stage=3", "engine.extra={x: 1}"], "engine.extra"),
    "a time": ({}, ["cluster.time=1"], "leaves no time to predict"),
    "ranks": ({"procs": 2}, [], "from the cluster"),
    "a partition": ({}, ["cluster.partition=nope"], "invalid partition"),
    "a disk of this machine": ({}, ["cluster.allow_local_disk=false"], "other nodes do not see"),
    "an option": ({}, ["cluster.sbatch.array=0-3"], "not for predicting"),
    "an unknown launcher": ({"launcher": "slrum"}, [], "slrum"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_on_the_login_node(model: str, tmp_path: Path, name: str):
    how, more, what = REFUSALS[name]
    table, out = str(tmp_path / "texts.jsonl"), tmp_path / "out.jsonl"
    asked = [*TWO_NODES, *SMALL, *more]
    with pytest.raises(ConfigError, match=what):
        predict(
            model, asked, **{"task": TASK, "data": table, "out": out, "launcher": "slurm", **how}
        )
    assert not out.with_name(f".{out.name}.parts").exists(), "nothing is left of what was refused"


def test_what_is_no_job(model: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="writes a file"):
        predict(model, task=TASK, text="a text", launcher="slurm")
    with pytest.raises(ConfigError, match="an array"):
        evaluate(model, every=True, launcher="slurm")


def test_a_strangers_folder_runs_no_command(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(permission.ALLOWED, "")
    values = {
        "evaluate": {"model": str(tmp_path), "out": str(tmp_path)},
        "tokenizer": {"path": str(corpus / "tokenizer")},
        "objective": {"name": "clm"},
        "data": {"seq_len": 8, "sources": [{"shards": "pipe:cat {}"}], "allow_pipe": True},
    }
    (tmp_path / "config.yaml").write_text(to_yaml(ShardsConfig.model_validate(values)))
    with pytest.raises(ConfigError, match="may run commands"):
        open_job(str(tmp_path)).check(1, device_type="cpu")
    assert not open_job(str(tmp_path), [f"{permission.PIPE}=true"]).check(1, device_type="cpu")
    with pytest.raises(ConfigError, match="as it was asked for"):
        open_job(str(tmp_path), ["data.seq_len=9"])
