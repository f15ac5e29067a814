"""Files are whole or absent, links are not followed, two writers do not write into each other."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfscale.errors import DataError
from hfscale.shards import files
from hfscale.shards.files import alone, locked, whole, whole_folder, write_atomically


def test_a_planted_link_is_neither_followed_nor_in_the_way(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".environment.json.tmp", "environment.json"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(tmp_path / "environment.json", b"{}")
    assert victim.read_text() == "mine"
    assert (tmp_path / "environment.json").read_text() == "{}"
    assert not (tmp_path / "environment.json").is_symlink()
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError) as error, locked(tmp_path / "lock"):
        pass
    assert error.value.errno == errno.ELOOP
    assert victim.read_text() == "mine"


def test_a_file_is_whole_or_as_it_was(tmp_path: Path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old", private=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(TypeError), whole(path) as file:
        file.write(b"half" + file)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(DataError, match="cannot write"):
        write_atomically(tmp_path / "nowhere" / "b", b"")


def test_what_a_kill_left_is_swept_once_it_is_old(tmp_path: Path):
    old, young, other = (
        tmp_path / name for name in (".a.00112233aabbccdd.tmp", ".b.00112233aabbccdd.tmp", ".c.tmp")
    )
    for path in (old, young, other):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * files.STALE_S,) * 2)
    write_atomically(tmp_path / "d", b"")
    assert not old.exists()
    assert young.exists() and other.exists()  # another process may be at it; not of ours


def test_a_second_process_is_refused_and_the_name_goes_with_the_first(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    code = "import sys; from pathlib import Path; from hfscale.shards.files import alone\n"
    code += "with alone(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(DataError, match=f"process {other.pid}"), alone(path):
            pass
        other.stdin.close()
        assert other.wait() == 0
    with alone(path):
        assert os.listdir(tmp_path) == [".out.jsonl.lock"]
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_made_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match="cannot write: Not a directory"),
        alone(tmp_path / "file/a"),
    ):
        pass


def test_a_folder_appears_whole_and_what_a_kill_left_goes(tmp_path: Path):
    out = tmp_path / "model"
    (tmp_path / ".model.00112233aabbccdd.new").mkdir()
    with whole_folder(out) as partial:
        (partial / "weights").write_bytes(b"1")
        assert {*os.listdir(tmp_path)} == {".model.lock", partial.name}
        with pytest.raises(DataError, match="another process"), whole_folder(out):
            pass
    assert os.listdir(tmp_path) == ["model"]
    with pytest.raises(DataError, match="exists already"), whole_folder(out):
        pass
    assert (out / "weights").read_bytes() == b"1"


def test_a_file_system_without_locks_has_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)  # as Lustre does without -o flock
    with (
        alone(tmp_path / "a"),
        pytest.raises(DataError, match="another process is making this"),
        alone(tmp_path / "a"),
    ):
        pass
    assert os.listdir(tmp_path) == []
