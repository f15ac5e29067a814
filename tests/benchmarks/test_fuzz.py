"""A small part of ``benchmarks/fuzz``: hostile configs, shards, tars and variables end in no
traceback, hang or silent change.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import ROOT

QUICK = ["configs", "overrides", "manifests of shards", "indexes", "bytes of shards", "environment"]
SCRIPT = """
import sys
from pathlib import Path
from benchmarks.fuzz.base import add_files
from benchmarks.fuzz.many import run
home = Path(sys.argv[1])
add_files(home / "base")
tallies = run(int(sys.argv[2]), seed=11, home=home, only=sys.argv[3:], base=home / "base")
print("bad", [line for tally in tallies.values() for line in tally.bad])
print("refused", sum(tally.kinds["refused"] for tally in tallies.values()))
"""


def test_no_traceback_no_hang_no_silent_change(corpus: Path, tmp_path: Path):
    shutil.copytree(corpus, tmp_path / "base")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "100", *QUICK],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "\nbad []\n" in done.stdout, done.stdout + done.stderr
    assert int(done.stdout.rsplit("refused ", 1)[1]) > 50


@pytest.mark.slow
def test_runs_models_and_tables(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz", "--inputs", "40", "--seed", "12", "--dry"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1].split("|")
    assert [cell.strip() for cell in last[-6:-2]] == ["0"] * 4, done.stdout + done.stderr
