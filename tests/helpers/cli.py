"""The ``hfscale`` command in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def listen_to_ctrl_c() -> None:
    """Let a child hear SIGINT, which a background job of a shell, as tests may be, ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def hfscale(
    *args: object,
    cwd: Path | str | None = None,
    timeout_s: float = 300.0,
    check: bool = True,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Return the finished command with its output; with ``check`` a failure shows that output.

    ``cwd`` is the folder that paths in configs are relative to.
    """
    environment = (
        os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "NO_COLOR": "1",
            "COLUMNS": "140",
        }
        | (env or {})
    )
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *map(str, args)],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )
    if check:
        assert done.returncode == 0, (
            f"hfscale {' '.join(map(str, args))} ended with "
            f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done
