"""slurm/shards.sbatch on a real cluster: an array with a task that fails, submitted again, comes to
the shards of one process.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfscale.config.corpus import CorpusConfig
from hfscale.config.load import load_config
from hfscale.corpus.build import build_shards
from tests.helpers.cli import ROOT, hfscale
from tests.helpers.slurm import Cluster, wait_for

SMALL = ("--mem=100", "--cpus-per-task=1", "--oversubscribe")
CONFIG = """
source: {format: jsonl, path: text}
split: {validation: 0.2}
tokenizer: {path: %s}
shards: {path: shards, shard_mb: 0.02, chunk_mb: 0.005, procs: 1}
"""


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/*"))}


def run_array(cluster: Cluster, folder: Path, tasks: str) -> list[tuple[str, str]]:
    """Return state and output of each task of the array, once all have ended."""
    job = cluster.sbatch(
        f"--array={tasks}",
        *SMALL,
        f"--output={folder}/%A-%a.log",
        f"--chdir={ROOT}",
        "slurm/shards.sbatch",
        folder / "corpus.yaml",
        f"source.path={folder}/text",
        f"shards.path={folder}/shards",
        cwd=ROOT,
        env=cluster.env | {"PYTHONPATH": str(ROOT)},
    )
    wait_for(
        lambda: cluster.run("squeue", "-h", "-j", job, check=False).strip() == "",
        timeout_s=90,
        every_s=0.3,
    )
    first, last = map(int, tasks.split("-"))
    return [
        (cluster.state(f"{job}_{task}"), (folder / f"{job}-{task}.log").read_text())
        for task in range(first, last + 1)
    ]


@pytest.mark.slow
def test_an_array_builds_what_one_process_builds(cluster: Cluster, corpus: Path, tmp_path: Path):
    (tmp_path / "corpus.yaml").write_text(CONFIG % (corpus / "tokenizer"))
    (tmp_path / "text").mkdir()
    texts = sorted((corpus / "text").glob("*.py"))
    for k in range(4):
        # the last one comes twice
        rows = [json.dumps({"text": file.read_text()}) for file in texts[k * 8 : k * 8 + 9]]
        (tmp_path / "text" / f"{k}.jsonl").write_text("\n".join(rows) + "\n")
    bad = tmp_path / "text" / "3.jsonl"
    good = bad.read_bytes()
    bad.write_bytes(good[:-2] + b"?\n")

    done, failed = run_array(cluster, tmp_path, "0-1")
    assert (done[0], failed[0]) == ("COMPLETED", "FAILED"), (done, failed)
    assert "part 0/2 is built; missing: 1." in done[1]
    assert "3.jsonl:9" in failed[1]
    assert "part 1/2 failed on n" in failed[1]
    assert not (tmp_path / "shards").exists()

    bad.write_bytes(good)
    tasks = run_array(cluster, tmp_path, "0-1")
    assert [state for state, _ in tasks] == ["COMPLETED"] * 2, tasks
    assert any("36 documents read; left out: 3 duplicates" in said for _, said in tasks), tasks
    overrides = [f"source.path={tmp_path}/text", f"shards.path={tmp_path}/alone"]
    build_shards(load_config(tmp_path / "corpus.yaml", overrides, schema=CorpusConfig).config)
    assert content(tmp_path / "shards") == content(tmp_path / "alone")


def test_an_array_with_gaps_is_refused(cluster: Cluster, tmp_path: Path):
    [(state, said)] = run_array(cluster, tmp_path, "3-3")
    assert state == "FAILED"
    assert "an array from 0 without gaps" in said


def test_a_part_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "corpus.yaml").write_text(CONFIG % "tokenizer")
    done = hfscale("shards", "build", "corpus.yaml", "--part", "8/8", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "say --part 0/8, 1/8" in done.stderr
