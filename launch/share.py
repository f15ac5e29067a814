"""What hfscale has that is no Python: configs, the scripts for Slurm, the pins.

In a checkout they lie in its folders, where one edits them; a wheel carries them in
``launch/share`` (setup.py), from where `hfscale configs copy` takes them.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from hfscale.config.schema import Cluster
from hfscale.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]  # holds the packages hfscale and launch
CARRIED = Path(__file__).with_suffix("")
SCRIPTS = ("train.sbatch", "start.sh", "site.sh")  # of a job: the first is Slurm's
SHARED = ("configs", "slurm", "constraints.txt")


def share() -> Path:
    """Return the folder that holds ``configs/``, ``slurm/`` and ``constraints.txt``."""
    return CARRIED if CARRIED.is_dir() else ROOT


def scripts_home(cluster: Cluster) -> Path:
    """Return the folder whose ``slurm/`` a job starts from: the user's own, or the one that
    hfscale brings.

    Raises:
        ConfigError: if it has no ``slurm/train.sbatch``.
    """
    home = Path(cluster.scripts).absolute() if cluster.scripts else share()
    if not (home / "slurm" / "train.sbatch").is_file():
        raise ConfigError(
            "this folder has no slurm/train.sbatch",
            where="cluster.scripts" if cluster.scripts else "hfscale",
            value=home,
            remedy="`hfscale configs copy FOLDER` makes one to edit: cluster.scripts=FOLDER",
        )
    return home


def check_scripts(cluster: Cluster) -> None:
    """Return if the shell can read the scripts of a job: found out here, it costs no queue.

    Raises:
        ConfigError: naming the script and its line.
    """
    for name in SCRIPTS:
        file = scripts_home(cluster) / "slurm" / name
        if not file.is_file():
            raise ConfigError(
                f"there is no slurm/{name}",
                where=file.parent,
                remedy="`hfscale configs copy FOLDER` brings one: cluster.scripts=FOLDER",
            )
        if name == SCRIPTS[0] and not file.read_bytes().startswith(b"#!"):
            raise ConfigError(
                "a script of Slurm begins with #! and its shell",
                where=f"{file}:1",
                value=file.read_text(errors="replace")[:40].partition("\n")[0],
                remedy="#!/bin/bash",
            )
        if shutil.which("bash") is None:  # then sbatch is not here either
            continue
        done = subprocess.run(["bash", "-n", file], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(
                f"the shell cannot read slurm/{name}: {done.stderr.strip().splitlines()[-1]}",
                where=file,
                remedy="mend the line: a quote, a bracket or a word of the shell is left open",
            )


def copy(folder: Path) -> list[Path]:
    """Return the files that were copied into ``folder``, for a user to edit. Nothing of a user's is
    written over.

    Raises:
        ConfigError: if one of them is there already.
    """
    sources = [file for name in SHARED for file in _files(share() / name)]
    targets = [folder / source.relative_to(share()) for source in sources]
    if there := [target for target in targets if target.exists()]:
        raise ConfigError(
            f"{len(there)} of the files are there already",
            where=folder,
            value=str(there[0].relative_to(folder)),
            remedy="name a new folder",
        )
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return targets


def _files(path: Path) -> list[Path]:
    """Return ``path``, or the files below it, without what Python leaves there."""
    if path.is_file():
        return [path]
    return sorted(
        file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    )
