"""One input: what becomes of it, in a fork of this process with limits on time and memory."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fuzz.act import Act, Random
from benchmarks.fuzz.surfaces import Surface

LIMIT_S, MEMORY_BYTES = 60.0, 32 << 30  # of one input
TRACEBACK = "Traceback (most recent call last)"


@dataclass
class Outcome:
    """What became of an input."""

    kind: str  # refused, accepted, traceback, hang, killed, silent
    code: int
    output: str
    seconds: float = 0.0


def attempt(surface: Surface, rng: Random, base: Path, scratch: Path, truth: str | None) -> Outcome:
    """Return what becomes of one input of ``surface``, in a fork of this process."""
    home = scratch / "case"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    for name in surface.needs:
        source = base / name
        copy: Any = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, home / name)
    relocate(home, base)
    act, began = surface.bend(rng, home), time.monotonic()
    out = scratch / "output"
    pid = os.fork()
    if pid == 0:
        _child(act, home, out, scratch / "said")
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > LIMIT_S:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Outcome("hang", -1, out.read_text(errors="replace"), LIMIT_S)
        time.sleep(0.005)
    code, output = os.waitstatus_to_exitcode(ended[1]), out.read_text(errors="replace")
    said = (scratch / "said").read_text() if (scratch / "said").is_file() else ""
    (scratch / "said").unlink(missing_ok=True)
    kind = kind_of(code, output)
    if kind == "accepted" and truth is not None and said not in ("", truth):
        kind = "silent"
    return Outcome(kind, code, output, time.monotonic() - began)


def kind_of(code: int, output: str) -> str:
    """Return what a process came to, by its exit code and what it printed."""
    if code < 0:
        return "killed"
    if TRACEBACK in output or code not in (0, 1, 2, 75, 76):
        return "traceback"
    return {0: "accepted", 2: "refused"}.get(code, "other")


def relocate(home: Path, base: Path) -> None:
    """Let configs in ``home`` speak of it and not of the base they were copied from."""
    for file in [*home.glob("*.yaml"), *home.glob("runs/*/config.yaml")]:
        file.write_text(file.read_text().replace(str(base), str(home)))


def _child(act: Act, home: Path, out: Path, said: Path) -> None:
    """Do it, and end the process."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(home)
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        from hfscale.errors import exit_code

        try:
            digest = act()
            if isinstance(digest, str):
                said.write_text(digest)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException as error:
            known = exit_code(error)
            if known is None:
                traceback.print_exc()
            code = 1 if known is None else known
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
