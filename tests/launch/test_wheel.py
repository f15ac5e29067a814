"""What `pip install .` gives: the same command, with its configs and its scripts for Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers.cli import ROOT
from tests.helpers.corpus import run_values
from tests.helpers.slurm import Cluster

pytestmark = pytest.mark.slow
SOURCES = ("hfscale", "launch", "configs", "slurm")
FILES = ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "constraints.txt", "README.md")
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel; what hfscale needs it borrows from this one."""
    home = tmp_path_factory.mktemp("wheel")
    source, venv = home / "source", home / "venv"
    source.mkdir()
    for name in SOURCES:
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=without)
    for name in (*FILES, "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(home), str(source)]
    subprocess.run(wheel, check=True, timeout=120)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    [built] = home.glob("*.whl")
    python = str(venv / "bin" / "python")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", str(built)]
    # a checkout on the path would count as installed
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(install, check=True, timeout=120, env=alone, cwd=home)
    [packages] = (venv / "lib").glob("python*/site-packages")
    # a plain path: what is editable there is not followed
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


@pytest.fixture
def installed(environment: Path, tmp_path: Path) -> Command:
    """Run the installed ``hfscale`` in a folder that has none of its files."""

    def run(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(environment / "bin" / "hfscale"), *map(str, args)],
            cwd=tmp_path,
            env=kept | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | (env or {}),
            text=True,
            capture_output=True,
            timeout=120,
            check=False,
        )

    return run


def test_a_wheel_has_its_configs_scripts_and_types(
    environment: Path, installed: Command, tmp_path: Path
) -> None:
    [packages] = (environment / "lib").glob("python*/site-packages")
    assert (packages / "hfscale" / "py.typed").is_file()
    listed = installed("configs")
    assert listed.returncode == 0, listed.stderr
    for file in (ROOT / "configs").rglob("*.yaml"):
        assert str(file.relative_to(ROOT)) in listed.stdout
    assert installed("configs", "copy", "mine").returncode == 0
    for name in ("configs/pretrain/gpt2_small.yaml", "slurm/site.sh", "constraints.txt"):
        assert (tmp_path / "mine" / name).read_bytes() == (ROOT / name).read_bytes()
    shown = installed("show", "mine/configs/pretrain/gpt2_small.yaml")
    assert shown.returncode == 0, shown.stderr
    again = installed("configs", "copy", "mine")
    assert again.returncode == 2
    assert "are there already" in again.stderr


def test_a_wheel_submits_and_its_job_trains(
    installed: Command, cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    asks = {"nodes": 1, "allow_local_disk": True, "sbatch": {"ntasks-per-node": 2}}
    train = {"steps": 2, "global_batch": 4, "micro_batch": 2}
    values = run_values(corpus, tmp_path / "runs", "run", cluster=asks, train=train)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    slurm = {name: cluster.env[name] for name in ("SLURM_CONF", "PATH")}
    # of the world of whoever submits, which is none of the job's
    slurm |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    nowhere = installed(
        "pretrain", "config.yaml", "cluster.scripts=nowhere", "--launcher", "slurm", env=slurm
    )
    assert nowhere.returncode == 2
    assert "no slurm/train.sbatch" in nowhere.stderr
    assert installed("configs", "copy", "mine").returncode == 0
    site = tmp_path / "mine" / "slurm" / "site.sh"
    site.write_text(f"{site.read_text()}\necho the site of this lab\n")
    done = installed(
        "pretrain", "config.yaml", "cluster.scripts=mine", "--launcher", "slurm", env=slurm
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(":")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    [log] = (tmp_path / "runs" / "run" / "logs").glob("slurm-*.log")
    assert "the site of this lab" in log.read_text()
    assert len((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()) == 2
