"""`hfscale doctor` on this machine and in an allocation of a real cluster, with real things that
are wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.cli import ROOT, hfscale
from tests.helpers.corpus import run_values
from tests.helpers.needs import lacking
from tests.helpers.slurm import Cluster, processes_of

NO_SLURM = {"PATH": os.path.dirname(sys.executable)}


def write_config(corpus: Path, folder: Path, **sections: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    values = run_values(
        corpus,
        folder / "runs",
        "run",
        train={"steps": 1, "global_batch": 4, "micro_batch": 2},
        **sections,
    )
    path.write_text(yaml.safe_dump(values))
    return path


def by_check(said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["check"]: one for one in said["findings"]}


@pytest.fixture
def poor_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte that nobody may write to."""
    folder = tmp_path / "runs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        lacking("mounting takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_machine_without_slurm_and_without_a_config(tmp_path: Path):
    done = hfscale("doctor", cwd=tmp_path, env=NO_SLURM, timeout_s=60)
    lines = {line[6:].split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "none on this machine" in lines["Slurm"]
    assert lines["rendezvous"].startswith("ok    rendezvous")
    for check, unit in {
        "matrix products": "TFLOP/s",
        "memory speed": "GB/s",
        "writing": "MB/s",
        "all-reduce": "GB/s",
        "clocks": "s apart",
    }.items():
        assert unit in lines[check], done.stdout
    assert "leave out" not in done.stdout
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.slow
@pytest.mark.usefixtures("poor_disk")
def test_a_poor_disk_and_a_missing_shard(corpus: Path, tmp_path: Path):
    shutil.copytree(corpus / "shards", tmp_path / "shards")
    (tmp_path / "shards" / "train" / "shard-000000.tar").unlink()
    config = write_config(
        corpus, tmp_path, data={"sources": [{"shards": str(tmp_path / "shards" / "train")}]}
    )
    done = hfscale("doctor", config, "--json", env=NO_SLURM, check=False, timeout_s=60)
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    findings = by_check(said)
    failed = {check for check, one in findings.items() if one["state"] == "fail"}
    assert failed == {"config", "folder", "free space", "writing", "reading"}
    assert "shard-000000.tar" in findings["reading"]["said"]
    assert "build the shards again" in findings["reading"]["remedy"]
    assert "Read-only file system" in findings["writing"]["said"]
    assert "a checkpoint takes about 0.000" in findings["free space"]["needs"]
    assert "run.root" in findings["writing"]["remedy"]
    assert not said["ok"]
    assert said["bad_nodes"] == [], "it is not this node's fault: there is no other"


@pytest.mark.slow
def test_a_node_without_the_shared_file_system_is_named(
    corpus: Path, tmp_path: Path, cluster: Cluster
):
    """On n2 another file system hides the folder of the run."""
    (tmp_path / "runs").mkdir()
    config = write_config(corpus, tmp_path, cluster={"allow_local_disk": True, "nodes": 2})
    [slurmd] = [
        pid
        for pid in processes_of(cluster.folder)
        if "slurmd\0-D\0-N\0n2" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    there = ["nsenter", "--target", str(slurmd), "--mount"]
    subprocess.run([*there, "mount", "-t", "tmpfs", "none", str(tmp_path / "runs")], check=True)
    try:
        doctor = [sys.executable, "-m", "launch.cli", "doctor", config, "--json"]
        out = cluster.run(
            "salloc",
            "--quiet",
            "--nodelist=n1,n2",
            "--ntasks-per-node=1",
            "--mem=100",
            "--oversubscribe",
            *doctor,
            check=False,
            timeout_s=90,
            cwd=tmp_path,
            env=cluster.env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    finally:
        subprocess.run([*there, "umount", str(tmp_path / "runs")], check=True)
    said = json.loads(out[out.index("{\n") : out.rindex("}") + 1])
    findings = {(one["check"], one["state"]): one for one in said["findings"]}
    assert said["nodes"] == ["n1", "n2"]
    assert said["bad_nodes"] == ["n2"], said
    assert findings["shared files", "fail"]["nodes"] == ["n2"]
    assert "run.root" in findings["shared files", "fail"]["remedy"]
    for check in ("parts", "reading", "all-reduce", "clocks", "rendezvous"):
        assert (check, "ok") in findings, said
    assert "2 ranks at n1:" in findings["rendezvous", "ok"]["said"]
    assert [state for check, state in findings if state == "fail"] == ["fail"]
