"""Ctrl-C at a command: said at once, one exit code, nothing half made left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.helpers.cli import ROOT, listen_to_ctrl_c


def interrupted(words: list[str], cwd: Path, *, when: str) -> subprocess.CompletedProcess[str]:
    """Return what a command said that got one SIGINT as soon as it had printed ``when`` on
    stderr.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_ctrl_c,
    )
    guard = threading.Timer(90, process.kill)
    guard.start()
    said = ""
    assert process.stderr is not None
    while when not in said and (line := process.stderr.readline()):
        said += line
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, rest = process.communicate()
    guard.cancel()
    assert time.monotonic() - began < 30, said + rest
    return subprocess.CompletedProcess(words, process.returncode, out, said + rest)


def test_ctrl_c_while_python_imports_is_no_traceback(tmp_path: Path):
    done = interrupted(["launch.entry", "show", "nowhere.yaml"], tmp_path, when="")
    assert done.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in done.stderr


def test_a_command_that_keeps_nothing_ends_with_130(tmp_path: Path):
    """One that sleeps stands for any that takes long."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time, launch.cli as cli\n"
        "def wait(**_):\n"
        "    print('begun', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "cli.app = wait\n"
        "cli.main()\n"
    )
    done = interrupted(["slow"], tmp_path, when="begun")
    assert done.returncode == 130
    assert "interrupted: cleaning up; Ctrl-C again kills" in done.stderr
    assert "Traceback" not in done.stderr
