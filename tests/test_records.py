"""Files that are read: regular ones of a bounded size, JSON of a known shape; what does not fit
names its key and value.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hfscale.errors import CheckpointError, DataError, UserError
from hfscale.records import STRICT, Count, Damaged, Record, is_name, load, open_file, parse


@dataclass(frozen=True)
class Shard:
    __pydantic_config__ = STRICT

    name: str
    size: Count


class Folder(Record):
    shards: list[Shard]
    note: str | None = None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"shards": [{"name": "a", "size": true}]}', r"shards\.0\.size: .*integer, not True"),
        ('{"shards": [{"name": "a", "size": 1.0}]}', r"shards\.0\.size: .*integer, not 1\.0"),
        ('{"shards": [{"name": "a", "size": "1"}]}', r"shards\.0\.size: .*integer, not '1'"),
        ('{"shards": [{"name": "a", "size": -1}]}', r"shards\.0\.size: .*greater.*0, not -1"),
        ('{"shards": [{"name": "a", "size": 9007199254740992}]}', r"shards\.0\.size: .*less than"),
        ('{"shards": [{"name": "a", "size": 1, "x": 2}]}', r"shards\.0\.x: unexpected"),
        ('{"shards": [{"name": null, "size": 1}]}', r"shards\.0\.name: .*string, not None"),
        ('{"shards": [{"name": "\\ud800", "size": 1}]}', "not JSON"),
        ('{"shards": {}}', r"shards: .*array, not \{\}"),
        ("{}", "shards: field required"),
        ("[]", "should be an object, not"),
        ("[" * 100_000, "not JSON: recursion limit"),
        ('{"a":' * 5_000, "not JSON: recursion limit"),
        ("9" * 10_000, "not JSON"),
        ("", "not JSON"),
    ],
)
def test_what_is_not_of_the_shape_is_refused_by_key_and_value(text: str, says: str):
    with pytest.raises(Damaged, match=says):
        parse(Folder, text)


def test_what_was_written_is_given_back_and_nothing_else():
    text = '{"shards": [{"name": "é", "size": 3}], "later": {"x": [1]}}'
    assert parse(Folder, text).as_dict() == {
        "shards": [{"name": "é", "size": 3}],
        "later": {"x": [1]},
    }


def test_only_regular_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, says in {
        "pipe": "no regular file",
        "zero": "no regular file",
        ".": "directory",
        "loop": "symbolic links",
        "a" * 300: "too long",
        "a\0b": "no name of a file",
        "\ud800": "no name of a file",
        "none": "No such file",
    }.items():
        with pytest.raises(OSError, match=says):
            open_file(f"{tmp_path}/{name}")


def test_the_class_of_the_error_and_the_file_are_named(tmp_path: Path):
    file = tmp_path / "state.json"
    file.write_text('{"shards": 5}')
    with pytest.raises(CheckpointError, match=r"the state is damaged: shards: [\s\S]*state\.json"):
        load(file, Folder, what="the state", error=CheckpointError)
    with pytest.raises(DataError, match="has more than"):
        load(file, Folder, what="the state", most=3)


def test_too_many_open_files_are_no_fault_of_the_file(tmp_path: Path):
    (tmp_path / "x").write_text("{}")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[Any] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        with pytest.raises(UserError, match=r"not open any more files[\s\S]*ulimit -n"):
            held.extend(open_file(tmp_path / "x") for _ in range(100))
    finally:
        for file in held:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_names():
    assert is_name("a/b") and is_name(Path("é" * 127))
    assert not any(map(is_name, ["a\0b", "é" * 128, "\ud800"]))


def test_code_of_strangers_has_a_time_limit():
    from hfscale.deadline import TookTooLong, deadline

    def loop() -> None:
        while True:
            pass

    with pytest.raises(TookTooLong), deadline(0.2):
        loop()
    with deadline(5.0):
        assert sum(range(10)) == 45


@pytest.mark.parametrize("name", ["RANK", "SLURM_STEP_NUM_TASKS", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["x", "", "-1", "1.5", "9" * 30])
def test_variables_that_are_no_numbers_are_named(name: str, value: str):
    from hfscale.dist.world import World

    place = {"RANK": "0", "MASTER_PORT": "12345"}
    env = {"SLURM_PROCID": "0"} if name == "SLURM_STEP_NUM_TASKS" else place
    with pytest.raises(UserError, match=rf"no such number[\s\S]*{name}"):
        World.from_environment(env | {name: value})


def test_ctrl_c_ends_what_is_in_native_code():
    """The main thread is in one long call of C; a child of this test, since the process ends."""
    script = """
import ctypes, os, signal, threading, time
from hfscale.dist.stop import ended_by_ctrl_c
with ended_by_ctrl_c("interrupted: nothing was made"):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    libc = ctypes.CDLL(None)
    for _ in range(3):
        libc.sleep(40)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted: nothing was made")
