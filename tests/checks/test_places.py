"""The list of checks, and those of depth `read`: permissions, room and quota of the folder that a
run writes to.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest

from hfscale.checks import places
from hfscale.checks.needs import Needs
from hfscale.checks.start import Notices, read, refuse
from hfscale.checks.table import CHECKS, of_depth
from hfscale.errors import ConfigError
from tests.helpers.needs import lacking


@dataclass
class Alone:
    """A start that asks nobody: of a folder, with what a run needs."""

    folder: Path
    needs: Needs = field(default_factory=Needs)
    expected: str = ""
    notices: Notices | None = None

    def queue(self) -> tuple[bool, str]:
        return True, "none"

    def config(self) -> Notices | None:
        return self.notices

    def allocation(self) -> Notices | None:
        return None

    def scripts(self) -> Notices | None:
        return None

    def request(self) -> Notices | None:
        return None

    def parts(self) -> Notices | None:
        return None


def test_each_check_is_one_row_with_a_remedy_and_what_it_looks_with():
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names))
    for check in CHECKS:
        assert check.remedy
        module, _, function = check.look.partition(":")
        assert not module or callable(getattr(import_module(module), function)), check.name
    assert [check.name for check in of_depth("read")][:2] == ["Slurm", "config"]


def test_a_folder_that_is_fine_says_nothing_to_a_start(tmp_path: Path):
    new = tmp_path / "runs" / "new"
    assert refuse(Alone(new)) == []
    said = {one.check: one for one in read(Alone(new))}
    assert {one.state for one in said.values()} == {"ok"}
    assert said["folder"].said == f"{tmp_path} can be written, where new will be made"
    assert refuse(Alone(new, notices=["a notice"])) == ["a notice"]


def test_a_run_that_has_no_room_is_refused_before_it_starts(tmp_path: Path):
    large = Needs(parameters=10**15, trained=10**15)
    with pytest.raises(ConfigError, match="free space: .* GB in") as refused:
        refuse(Alone(tmp_path, large))
    assert "a checkpoint takes about 12,000,000 GB" in str(refused.value)
    assert "checkpoint.keep_last" in refused.value.remedy


def test_a_folder_in_place_of_which_there_is_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is no folder"):
        refuse(Alone(tmp_path / "file" / "run"))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        lacking("mounting takes root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_system_that_is_read_only(read_only: Path):
    with pytest.raises(ConfigError, match="read only") as refused:
        refuse(Alone(read_only / "run"))
    assert "run.root" in refused.value.remedy
    mount, device, kind = places.mount_of(read_only / "run")
    assert (mount, device, kind) == (str(read_only), "none", "tmpfs")


def test_a_folder_of_somebody_else():
    """Root may write everywhere, so another user looks; also where the folder above is closed."""
    if os.geteuid():
        lacking("to become another user takes root")
    with tempfile.TemporaryDirectory() as made:  # pytest's own folders are closed to others
        above, inside = Path(made), Path(made) / "inside"
        inside.mkdir()
        above.chmod(0o755)
        assert said_to_nobody(inside) == f"fail: user 65534 may not write to {inside}"
        above.chmod(0o700)
        assert said_to_nobody(inside) == f"fail: user 65534 may not write to {above}"


def said_to_nobody(folder: Path) -> str:
    """Return what the check says of ``folder`` to user 65534, in a process of its own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:  # whatever happens, this copy of the tests must not go on
        try:
            os.setresuid(65534, 65534, 65534)
            [one] = places.folder(Alone(folder))
            os.write(writing, f"{one.state}: {one.said}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as answer:
        return answer.read()


QUOTA = """Disk quotas for user me (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
          /home  900000* 800000 1000000   6days     120       0       0
          /data  500000       0       0               4       0       0
"""
LUSTRE = "        /scratch 5000000       0 6000000       -   12345  0  1000000 -\n"


def test_what_is_left_of_a_quota():
    lines = QUOTA.splitlines()
    assert places.quota_left(lines, names=("/home", "/dev/sda1")) == 100_000 * 1024
    assert places.quota_left(lines, names=("/data", "/dev/sdb1")) is None, "0 is no limit"
    assert places.quota_left(lines, names=("/", "/dev/sdc1")) is None
    assert places.quota_left(LUSTRE.splitlines(), names=("/scratch", "x")) == 1_000_000 * 1024
    assert places.quota_left(["quota: error"], names=("quota:",)) is None


def test_a_quota_that_nobody_counts_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    [one] = places.quota(Alone(tmp_path))
    assert (one.state, one.said) == ("ok", "not readable: there is no `quota` here")
