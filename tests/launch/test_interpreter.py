"""Processes of ours import nothing from the folder where one stands."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

from launch.interpreter import ROOT, python


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path):
    for name in ("random", "yaml", "typer", "hfscale"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\nraise SystemExit(9)\n")
    done = subprocess.run(
        python("launch.cli", "--help"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "hfscale VERB --help" in done.stdout
    assert not (tmp_path / "ran").exists()


def test_every_process_of_ours_is_started_so():
    """``-m`` itself is only printed, in launch/local.py, for who reads what would run, and stands
    in jobs of Slurm, as in slurm/*.sbatch: these stand in the snapshot that they run.
    """
    others = {"local.py", "rehearsal/where.py"}
    launch = Path(ROOT, "launch")
    files = [path for path in launch.rglob("*.py") if str(path.relative_to(launch)) not in others]
    constants = {
        path: [
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant)
        ]
        for path in files
    }
    assert [path.name for path, values in constants.items() if "-m" in values] == []
