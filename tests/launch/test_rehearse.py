"""`hfscale rehearse`: what it makes of a config, what it refuses at once, what it says of what the
ranks have written; and a whole one, on this machine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.config.load import load_config
from hfscale.config.schema import Cluster
from hfscale.errors import CheckpointError, ConfigError, DataError
from hfscale.rehearsal.advice import seconds
from hfscale.rehearsal.plan import read_plan
from hfscale.rehearsal.verdict import judge
from launch.commands.rehearse import rehearse
from launch.rehearsal import kept
from launch.rehearsal.cluster import smaller
from launch.request import Request
from launch.share import check_scripts
from tests.helpers.cli import ROOT, hfscale
from tests.helpers.corpus import LLAMA, run_values
from tests.helpers.labelled import make_encoder, reviews, task_values, write_jsonl

WIDE = {
    "num_hidden_layers": 12,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    held_out = {"shards": str(corpus / "shards" / "validation")}
    sources = [{"shards": str(corpus / "shards" / "train")}]
    values = run_values(
        corpus,
        tmp_path / "runs",
        "mine",
        data={"seq_len": 32, "sources": sources, "validation": held_out},
        model={"architecture": "llama", "config": WIDE},
        train={"steps": 100_000, "global_batch": 64, "micro_batch": 8},
    )
    return write(tmp_path, values)


@pytest.mark.slow
def test_a_rehearsal_passes_on_this_machine(config: Path, tmp_path: Path):
    """The rest of its parts take a minute more: benchmarks/mistakes goes through all, on Slurm."""
    left = ("one rank stopped", "evaluation", "another world size")
    skip = [word for name in left for word in ("--skip", name)]
    done = hfscale("rehearse", config, "--procs", 2, "--json", "--keep", *skip)
    verdict = json.loads(done.stdout)
    states = {stage["name"]: stage["state"] for stage in verdict["stages"]}
    assert {states.pop(name) for name in ("time limit", *left)} == {"left out"}
    assert set(states.values()) == {"ok"}, done.stdout
    reached = {
        "data",
        "packages",
        "start",
        "signal",
        "all ranks killed",
        "exact",
        "one writer",
        "export",
    }
    assert set(states) == reached | {"a full disk"}
    [home] = (tmp_path / "runs").iterdir()
    run = home / "rehearsal"
    words = {stage["name"]: stage["words"] for stage in verdict["stages"]}
    assert "nothing lost" in words["signal"] and "1 of 5 steps lost" in words["all ranks killed"]
    plan = read_plan(run)
    assert plan.small.parameters < plan.whole.parameters / 20
    assert (home / "export" / "model.safetensors").is_file()
    check_what_would_have_failed(run)


def check_what_would_have_failed(run: Path) -> None:
    """The verdict is a function of the folder: each thing that is changed in it is named."""
    metrics = run / "metrics.jsonl"
    logged = metrics.read_text()
    lines = logged.splitlines()
    number = next(n for n, line in enumerate(lines) if json.loads(line)["step"] == 9)
    other = json.loads(lines[number])
    other["loss"] += 1e-6
    metrics.write_text("\n".join([*lines[:number], json.dumps(other), *lines[number + 1 :]]) + "\n")
    assert failed(run) == {"exact": "not what an undisturbed run is: loss of step 9"}
    metrics.write_text("\n".join([*lines, lines[number]]) + "\n")  # two wrote
    assert "was logged after step 12" in failed(run)["one writer"]
    metrics.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["attempt"] < 3))
    assert "the run did not go on" in failed(run)["all ranks killed"]
    metrics.write_text(logged)
    events = run / "rehearsal.jsonl"
    noted = [json.loads(line) for line in events.read_text().splitlines()]

    def with_event(name: str, **change: object) -> dict[str, str]:
        changed = [event | (change if event.get("name") == name else {}) for event in noted]
        events.write_text("".join(json.dumps(event) + "\n" for event in changed))
        return failed(run)

    assert with_event("export", code=2, words="error: a disk\n  where: here") == {
        "export": "exit code 2: error: a disk; where: here"
    }
    assert "no warning came" in with_event("signal", what="warned")["signal"]
    place = {"node": "n1", "device": "H100", "gpu": "0", "gpus": 1}
    ranks = {"what": "ranks", "attempt": 3, "time": 0.0, "places": [place, place]}
    noted.append(ranks)
    assert with_event("") == {"start": "2 ranks share 1 GPUs on n1"}
    noted[-1] = ranks | {"places": [place]}
    assert "not the 2 that were asked for" in with_event("")["start"]
    del noted[-1]
    assert with_event("") == {}
    said = judge(run, ended="job 7 ended FAILED: no Python")
    assert not said.passed and "no Python" in "\n".join(said.lines())


def failed(run: Path) -> dict[str, str]:
    return {stage.name: stage.words for stage in judge(run).stages if stage.state == "fail"}


def test_what_is_not_to_be_started_again_is_said(tmp_path: Path):
    """A command that stops, hangs and is killed is started again; one that is refused is not."""
    from launch.rehearsal.here import rehearse_here

    script = """
    echo x >> starts
    case $(wc -l < starts) in 1) exit 75 ;; 2) exit 77 ;; 3) kill -9 $$ ;; esac
    [ ! -e wrong ] || { echo "error: no such thing"; echo "  where: here"; exit 2; }
    """
    command = ["bash", "-c", f"cd {tmp_path}; {script}"]
    assert rehearse_here(command, tmp_path / "rehearsal") == ""
    assert len((tmp_path / "starts").read_text().splitlines()) == 4
    (tmp_path / "wrong").touch()
    ended = rehearse_here(command, tmp_path / "rehearsal")
    assert ended == "attempt 0 ended with code 2: error: no such thing where: here"


def test_what_a_dry_run_refuses_is_refused_at_once(config: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be cut into micro-batches"):
        rehearse(str(config), ["train.micro_batch=64", "train.global_batch=64"], procs=3)
    with pytest.raises(ConfigError, match="no rehearsal by this launcher"):
        rehearse(str(config), launcher="debug")
    with pytest.raises(ConfigError, match="a rehearsal has no such part"):
        rehearse(str(config), procs=2, skip=["signals"])
    assert not list((tmp_path / "runs").glob("*")), "nothing is left"


def test_a_run_that_is_under_way_is_not_rehearsed(config: Path, tmp_path: Path):
    from hfscale.config.load import to_yaml
    from hfscale.monitor.fence import take

    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config(config).config))
    with take(run, launcher="local").kept(), pytest.raises(CheckpointError, match="is under way"):
        rehearse(str(config), procs=2)


def test_a_damaged_shard_is_named_before_anything_starts(
    config: Path, corpus: Path, tmp_path: Path
):
    shards = Path(shutil.copytree(corpus / "shards" / "train", tmp_path / "shards"))
    asked = [f"data.sources=[{{shards: '{shards}'}}]"]
    tar = sorted(shards.glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=f"a shard is damaged(.|\n)*{tar.name}"):
        rehearse(str(config), asked, procs=2)
    tar.write_bytes(content[:-512])
    with pytest.raises(DataError, match=f"not as long as its manifest says(.|\n)*{tar.name}"):
        rehearse(str(config), asked, procs=2)
    assert not list((tmp_path / "runs").glob("*")), "nothing is left"


def test_a_log_is_told_by_what_began_it_and_what_came_last(tmp_path: Path):
    from launch.rehearsal.cluster import last_words

    assert last_words(tmp_path) == "it left no log"
    (tmp_path / "logs").mkdir()
    lines = [
        "slurm/site.sh: line 7: module: command not found",
        "12:00:00 job 7, restart 0: 2 ranks",
        *(f"line {number}" for number in range(20)),
        "srun: error: n1: task 0: Exited with exit code 1",
    ]
    (tmp_path / "logs" / "slurm-7.log").write_text("\n".join(lines))
    words = last_words(tmp_path)
    assert words.startswith("slurm/site.sh: line 7: module: command not found | line 14")
    assert words.endswith("line 19")


def test_a_run_is_copied_with_what_it_needs_to_go_on(tmp_path: Path):
    """Of a run that borrows its tokenizer, the tokenizer too."""
    from hfscale.rehearsal.job import fork

    run, other = tmp_path / "rehearsal", tmp_path / "other"
    for step in (8, 10, 12):
        saved = run / "checkpoints" / f"step-{step:08}"
        saved.mkdir(parents=True)
        (saved / "manifest.json").touch()
    (run / "tokenizer").mkdir()
    (run / "config.yaml").touch()
    fork(run, other)
    fork(run, other)  # again, in place of what was there
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["step-00000010"]
    assert sorted(path.name for path in other.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "tokenizer",
    ]


# -------------------------------------------------------------------------------------- what is cut
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 64},
    "llama": WIDE,
    "qwen3": {**WIDE, "head_dim": 128},
    "gemma3_text": {**WIDE, "head_dim": 64},  # five local layers to a global one
    "mixtral": {**WIDE, "num_local_experts": 4},
    "opt": {"hidden_size": 768, "num_attention_heads": 12, "ffn_dim": 3072},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_is_cut_and_stays_of_its_kind(corpus: Path, tmp_path: Path, architecture: str):
    from hfscale.run.run import Run
    from launch.rehearsal.shrink import shrink

    model = {"architecture": architecture, "config": ARCHITECTURES[architecture]}
    file = write(tmp_path, run_values(corpus, tmp_path, "mine", model=model))
    shrunk = shrink(Request(str(file)), home=tmp_path, procs=2)
    assert shrunk.small.parameters < shrunk.whole.parameters / 10, shrunk
    whole = Run(load_config(file).config).shape.model_config
    small = Run(load_config(file, shrunk.overrides).config).shape.model_config
    assert type(small) is type(whole)
    assert small.vocab_size == whole.vocab_size
    kinds = getattr(whole, "layer_types", None)
    if kinds:
        assert set(small.layer_types) == set(kinds)
    if getattr(whole, "num_key_value_heads", None):
        groups = [c.num_attention_heads // c.num_key_value_heads for c in (small, whole)]
        assert groups[0] == groups[1]


def test_a_small_model_is_taken_as_it_is(corpus: Path, tmp_path: Path):
    from launch.rehearsal.shrink import shrink

    file = write(tmp_path, run_values(corpus, tmp_path, "mine", model=LLAMA))
    shrunk = shrink(Request(str(file)), home=tmp_path, procs=1)
    assert shrunk.small == shrunk.whole
    config = load_config(file, shrunk.overrides).config
    assert (config.train.steps, config.checkpoint.every_steps) == (12, 2)


def test_of_a_fine_tuning_a_few_examples_are_held_out(tmp_path: Path):
    from launch.rehearsal.shrink import shrink

    make_encoder(tmp_path / "encoder")
    write_jsonl(tmp_path / "reviews.jsonl", reviews(100))
    file = write(tmp_path, task_values(tmp_path, "task"))
    shrunk = shrink(Request(str(file)), home=tmp_path, procs=2)
    held_out = (tmp_path / "held-out.jsonl").read_text().splitlines()
    assert 5 < len(held_out) <= 16 and set(json.loads(held_out[0])) == {"id", "text", "label"}
    config = load_config(file, shrunk.overrides).config
    assert config.data.validation == str(tmp_path / "held-out.jsonl")


# ---------------------------------------------------------------------------------------- the job's
def test_a_job_is_as_long_as_it_takes_to_be_warned():
    asked = Cluster(nodes=4, min_nodes=2, signal_s=300, time="24:00:00")
    assert smaller(asked) == (
        ["cluster.nodes=2", "cluster.min_nodes=null", "cluster.time='7'"],
        420,
    )
    assert smaller(Cluster(signal_s=60, time="2"))[1] == 120
    assert smaller(asked, warned=False)[1] == 1500


def test_a_pass_is_kept_until_scripts_or_cluster_change(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from launch.job import Training

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shutil.copytree(ROOT / "slurm", tmp_path / "site" / "slurm")
    asked = (f"cluster.scripts={tmp_path / 'site'}", "cluster.nodes=2")

    def said(*more: str) -> str:
        [line] = kept.said(Training(Request(str(config), (*asked, *more))))
        return line

    assert "no rehearsal has passed" in said()
    kept.keep(Training(Request(str(config), asked)).cluster, name="mine", seconds=100.0)
    assert "passed" in said() and "no rehearsal" not in said()
    assert "no rehearsal has passed" in said("cluster.nodes=3")
    with open(tmp_path / "site" / "slurm" / "site.sh", "a") as file:
        file.write("module load cuda\n")
    assert "no rehearsal has passed" in said()


def test_times_of_slurm():
    assert [seconds(one) for one in ("00:00:30", "90", "2-12", "1-00:00:10", "UNLIMITED", "")] == [
        30.0,
        5400.0,
        216000.0,
        86410.0,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("site.sh", "export A='x", "cannot read slurm/site.sh(.|\n)*line"),
        ("train.sbatch", "bash\n", "begins with #!"),
        ("train.sbatch", "#!/bin/bash\nif true; then\n", "cannot read slurm/train.sbatch"),
        ("start.sh", None, "there is no slurm/start.sh"),
    ],
)
def test_a_script_that_the_shell_cannot_read_is_named(
    tmp_path: Path, name: str, text: str | None, words: str
):
    file = Path(shutil.copytree(ROOT / "slurm", tmp_path / "slurm")) / name
    cluster = Cluster(scripts=str(tmp_path))
    check_scripts(cluster)
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        check_scripts(cluster)
