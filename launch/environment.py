"""What an attempt of a run is made with, enough to make it again: command, packages, code and its
uncommitted changes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import TypedDict

from hfscale.run_files import PATCH
from hfscale.shards.files import write_atomically

MAX_PATCH_BYTES = 16 * 2**20
OURS = ("hfscale", "launch")  # no other file: site.sh may hold passwords
CODE = Path(__file__).resolve().parents[1]


def describe(run_dir: Path) -> dict[str, object]:
    """Return what this process can tell of the attempt that it starts. What the ranks know is added
    by them (``jobs/environment.py``).
    """
    packages = {found.name: found.version for found in distributions() if found.name}
    return {
        "command": sys.argv,
        "cwd": os.getcwd(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items())),
        "code": code(CODE, run_dir),
    }


class Code(TypedDict):
    """What runs, of a checkout; nulls where it is none."""

    revision: str | None
    patch: str | None  # the name of the file in the run directory, or why there is none


def code(root: Path, run_dir: Path) -> Code:
    """Return the commit of the checkout ``root`` and the patch, now in ``run_dir``, that makes it
    what runs; nulls where it is none.
    """

    def git(*arguments: str, codes: tuple[int, ...] = (0,)) -> bytes | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode in codes else None

    found = Code(revision=None, patch=None)
    if not git("ls-files", "--error-unmatch", "launch") or not (
        revision := git("rev-parse", "HEAD")
    ):
        return found  # not a checkout, or installed inside one of somebody else's
    found["revision"] = revision.decode().strip()
    new = (
        (git("ls-files", "--others", "--exclude-standard", "-z", *OURS) or b"")
        .decode()
        .split("\0")[:-1]
    )
    added = (
        git("diff", "--no-index", "--binary", "/dev/null", file, codes=(0, 1)) or b""
        for file in new
    )
    patch = b"".join([git("diff", "--binary", "--relative", "HEAD", "--", *OURS) or b"", *added])
    if len(patch) > MAX_PATCH_BYTES:
        found["patch"] = f"not kept: {len(patch):,} bytes"
    elif patch:
        name = PATCH.format(hashlib.sha256(patch).hexdigest()[:12])
        found["patch"] = name
        write_atomically(run_dir / name, patch)
    return found
