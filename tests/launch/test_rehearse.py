"""`hfscale rehearse`: what it makes of a config, what it refuses at once, what it says of what the
ranks have written; and a whole one, on a Slurm of its own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.checks.table import of_depth
from hfscale.config.load import load_config
from hfscale.config.schema import Cluster
from hfscale.errors import EXIT_INTERRUPTED, CheckpointError, ConfigError, DataError
from hfscale.log import logger
from hfscale.rehearsal.advice import seconds
from hfscale.rehearsal.plan import read_plan
from hfscale.rehearsal.verdict import judge
from launch.commands.rehearse import rehearse
from launch.interrupt import Interrupted
from launch.private_slurm import this_host
from launch.rehearsal import kept
from launch.rehearsal.cluster import how_it_left, number, smaller, submitted
from launch.rehearsal.private import NODES, stands_for
from launch.rehearsal.stages import STAGES
from launch.request import Request
from launch.share import check_scripts
from tests.helpers.cli import ROOT, hfscale, listen_to_ctrl_c
from tests.helpers.corpus import LLAMA, run_values
from tests.helpers.labelled import make_encoder, reviews, task_values, write_jsonl
from tests.helpers.needs import lacking
from tests.helpers.slurm import Cluster as SlurmCluster
from tests.helpers.slurm import missing, wait_for

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
def test_a_rehearsal_passes_on_a_private_slurm(config: Path, tmp_path: Path):
    """A job's own script, in as many attempts as things happen to it. The rest of its parts take
    two minutes more: benchmarks/mistakes goes through all.
    """
    if reason := missing():
        lacking(reason)
    left = ("time limit", "signal", "one rank stopped", "evaluation", "another world size")
    skip = [word for name in left for word in ("--skip", name)]
    asked = ["--private-slurm", "cluster.nodes=2", "cluster.partition=gpu", "cluster.signal_s=60"]
    done = hfscale("rehearse", config, *asked, "--json", "--keep", *skip)
    verdict = json.loads(done.stdout)
    states = {stage["name"]: stage["state"] for stage in verdict["stages"]}
    assert {states.pop(name) for name in ("the cluster itself", *left)} == {"left out"}
    assert set(states.values()) == {"ok"}, done.stdout
    reached = {
        "data",
        "packages",
        "start",
        "all ranks killed",
        "exact",
        "one writer",
        "export",
    }
    assert set(states) == reached | {"a full disk"}
    [home] = (tmp_path / "runs").iterdir()
    run = home / "rehearsal"
    words = {stage["name"]: stage["words"] for stage in verdict["stages"]}
    assert words["start"].startswith("2 ranks on private1, private2")
    assert "1 of 5 steps lost" in words["all ranks killed"]
    plan = read_plan(run)
    assert plan.small.parameters < plan.whole.parameters / 20
    assert (home / "export" / "model.safetensors").is_file()
    assert processes_that_name(home) == [], "the Slurm is taken down"
    check_what_would_have_failed(run)


def processes_that_name(folder: Path) -> list[int]:
    """Return the processes whose command line has a path in ``folder``."""
    there = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and bytes(folder) in (entry / "cmdline").read_bytes():
                there.append(int(entry.name))
    return there


@pytest.mark.slow
def test_ctrl_c_leaves_no_rank_and_no_folder(config: Path, tmp_path: Path):
    runs, said = tmp_path / "runs", tmp_path / "said"
    with open(said, "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "rehearse", str(config), "--procs", "2"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            preexec_fn=listen_to_ctrl_c,
        )
    beats = "*/rehearsal/heartbeats/rank-1"  # of two ranks
    wait_for(lambda: process.poll() is not None or list(runs.glob(beats)))
    [home] = runs.iterdir()
    assert len(processes_that_name(home)) > 2
    process.send_signal(signal.SIGINT)
    code, text = process.wait(90), said.read_text()
    assert code == EXIT_INTERRUPTED, text
    assert "interrupted: cleaning up" in text and "nothing of it is left" in text
    assert list(runs.iterdir()) == [] and "Traceback" not in text, text
    wait_for(lambda: not processes_that_name(home))


@pytest.mark.slow
def test_ctrl_c_leaves_no_job(
    config: Path,
    tmp_path: Path,
    cluster: SlurmCluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    asked = ("cluster.allow_local_disk=true", "cluster.sbatch.hold=true")
    run = tmp_path / "runs" / "mine"
    caplog.set_level(logging.INFO, logger=logger.name)
    with suppress(Interrupted), submitted(Request(str(config), asked)):
        job = number(run)
        assert cluster.state(job) == "PENDING"
        (run / "job").unlink()  # it came between submission and note
        raise Interrupted
    assert cluster.state(job) == "CANCELLED"
    assert f"job {job} is cancelled" in caplog.text


def test_no_slurm_is_said_at_once(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither a cluster, nor what a private one takes."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no Slurm answers here(.|\n)*--private-slurm"):
        rehearse(str(config), launcher="slurm")
    monkeypatch.setattr("launch.private_slurm.SBIN", str(tmp_path))
    with pytest.raises(ConfigError, match="munged, slurmctld(.|\n)*apt-get install"):
        rehearse(str(config), private=True)
    assert not list((tmp_path / "runs").glob("*")), "nothing is left"


def test_a_private_slurm_has_what_this_machine_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("launch.rehearsal.private.available_cores", lambda: 4)
    options = {"ntasks-per-node": 8, "cpus-per-task": 6, "reservation": "mine", "mem": "900G"}
    asked = Cluster(nodes=16, partition="gpu", sbatch=options)
    for named, nodes, ranks in ((True, NODES, 2), (False, (this_host(),), 4)):
        monkeypatch.setattr("launch.rehearsal.private.can_name_nodes", lambda named=named: named)
        machines, overrides = stands_for(asked)
        assert machines.nodes == nodes and machines.cpus == 6 * ranks
        assert f"cluster.nodes={len(nodes)}" in overrides and "cluster.partition=null" in overrides
        assert overrides[-1] == (
            f'cluster.sbatch={{"cpus-per-task": 6, "ntasks-per-node": {ranks}}}'
        )
    monkeypatch.setattr("launch.rehearsal.private.can_name_nodes", lambda: True)
    monkeypatch.setattr("launch.rehearsal.private.gpu_count", lambda: 4)
    machines, overrides = stands_for(Cluster(nodes=4, gpus_per_node=8))
    assert (machines.gpus, overrides[-1]) == (2, 'cluster.sbatch={"ntasks-per-node": 2}')
    assert "cluster.gpus_per_node=2" in overrides


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
    metrics.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["attempt"] < 2))
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
    killed = "all ranks killed"
    assert "no warning came" in with_event(killed, what="warned")[killed]
    place = {"node": "n1", "device": "H100", "gpu": "0", "gpus": 1}
    ranks = {"what": "ranks", "attempt": 2, "time": 0.0, "places": [place, place]}
    noted.append(ranks)
    assert with_event("") == {"start": "2 ranks share 1 GPUs on n1"}
    noted[-1] = ranks | {"places": [place]}
    assert "not the 2 that were asked for" in with_event("")["start"]
    del noted[-1]
    assert with_event("") == {}
    said = judge(run, ended="job 7 ended FAILED: no Python")
    assert not said.passed and "no Python" in "\n".join(said.lines())
    events.unlink()
    metrics.unlink()
    lines = [*judge(run, ended="job 7 ended FAILED").lines()]
    assert lines[0].split()[:2] == ["fail", "end"], "what began it comes first"
    [far] = [line for line in lines if line.startswith("missed")]
    assert "start, all ranks killed, exact, one writer, export: the run did not" in far


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
    tar.unlink()
    os.mkfifo(tar)  # to which nobody writes
    with pytest.raises(DataError, match=f"it is no regular file(.|\n)*{tar.name}"):
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


def test_each_part_is_a_row_of_the_list_of_checks():
    rows = [check.name for check in of_depth("run")]
    assert [name for name in rows if name in STAGES] == [*STAGES]


def test_how_a_job_left_is_said_in_words():
    assert how_it_left("2:0") == "exit code 2"
    limited = "SIGXFSZ: a file may not grow so large: `ulimit -f` in slurm/site.sh"
    assert how_it_left("0:25").endswith(limited) and how_it_left("153:0").endswith(limited)
    assert how_it_left("0:9") == "exit code 0:9, which is SIGKILL"
    assert how_it_left("") == "exit code unknown"


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
