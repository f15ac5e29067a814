"""What launch/setup.sh says on a machine that lacks something, and that it installs nothing
twice.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepare(tmp_path: Path, *, extra: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Return the finished `prepare_python`, with ``tmp_path/bin`` first on PATH and no active
    environment.
    """
    ours = ("VIRTUAL_ENV", "CONDA_PREFIX", "HFSCALE_VENV", "HFSCALE_NO_INSTALL")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    path = f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return subprocess.run(
        [
            "bash",
            "-c",
            f"set -euo pipefail; source launch/setup.sh; prepare_python {extra}; echo $PYTHON",
        ],
        cwd=ROOT,
        env=kept | {"PATH": path} | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def program(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def test_a_missing_venv_package_is_named(tmp_path: Path):
    program(
        tmp_path / "bin" / "python3",
        'case "$*" in *ensurepip*) exit 1 ;; esac',
        f'exec {sys.executable} "$@"',
    )
    done = prepare(tmp_path, HFSCALE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 2
    assert f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_that_is_too_old_is_named(tmp_path: Path):
    for name in ("python3", "python3.10", "python3.11", "python3.12"):
        program(tmp_path / "bin" / name, '[ "$1" = --version ] && echo "Python 3.7.16"', "exit 1")
    done = prepare(tmp_path, HFSCALE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 2
    assert "Python 3.7.16" in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr


def test_an_active_environment_of_another_python_is_refused(tmp_path: Path):
    program(
        tmp_path / "env" / "bin" / "python",
        '[ "$1" = --version ] && echo "Python 3.14.0"',
        "exit 1",
    )
    done = prepare(tmp_path, VIRTUAL_ENV=str(tmp_path / "env"))
    assert done.returncode == 2
    assert "Python 3.14.0" in done.stderr


def test_a_failed_installation_leaves_no_stamp_and_says_what_to_do(tmp_path: Path):
    program(
        tmp_path / "env" / "bin" / "python",
        'case "$*" in *"pip install"*) exit 1 ;; esac',
        f'exec {sys.executable} "$@"',
    )
    done = prepare(tmp_path, VIRTUAL_ENV=str(tmp_path / "env"))
    assert done.returncode == 2
    assert "-m pip install --disable-pip-version-check -c constraints.txt -e ." in done.stdout
    assert "PIP_FIND_LINKS" in done.stderr
    assert not (tmp_path / "env" / ".hfscale-installed").exists()


def test_what_is_installed_is_not_installed_again(tmp_path: Path):
    program(
        tmp_path / "env" / "bin" / "python",
        'case "$*" in *"pip install"*) exit 1 ;; esac',
        f'exec {sys.executable} "$@"',
    )
    content = f"{ROOT}\n".encode() + b"".join(
        (ROOT / name).read_bytes() for name in ("setup.cfg", "pyproject.toml", "constraints.txt")
    )
    (tmp_path / "env" / ".hfscale-installed").write_text(
        f"{hashlib.sha256(content).hexdigest()} dev\n"
    )
    for extra in ("dev", ""):  # the test tools come on top of what the quickstart needs
        done = prepare(tmp_path, extra=extra, VIRTUAL_ENV=str(tmp_path / "env"))
        assert done.returncode == 0, done.stderr
        assert "already installed" in done.stdout


def test_an_environment_can_be_used_as_it_is(tmp_path: Path):
    program(tmp_path / "bin" / "python", f'exec {sys.executable} "$@"')
    done = prepare(tmp_path, HFSCALE_NO_INSTALL="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "bin" / "python")
