"""What a rank of the doctor says of shards here and at a URL, and of packages out of range."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hfscale.checks import disks, machine
from hfscale.checks.gpu import complaints, rows_of, xids_of
from hfscale.checks.node import Node, Task
from hfscale.dist.world import Place, World
from hfscale.errors import DataError
from tests.helpers.web_server import serve


def node(*paths: object, rank: int = 0, size: int = 1, **remote: object) -> Node:
    task = Task(shards=list(map(str, paths)), remote=remote)
    return Node(task, World(Place(rank, size)))


def test_shards_of_a_url_are_sampled_and_not_kept(corpus: Path, tmp_path: Path):
    with serve(corpus / "shards") as server:
        [one] = disks.reading(node(f"{server.url}/train", folder=tmp_path, retries=0))
        assert one.unit == "MB/s a rank"
        assert one.value  # how fast that is, is the machine's affair
        assert sum(server.asked.values()) == 2, "a manifest and a piece of a shard"
        assert list(tmp_path.rglob("*.tar*")) == []
        server.statuses = [503, 503]
        with pytest.raises(DataError, match="503"):
            list(disks.reading(node(f"{server.url}/train", folder=tmp_path, retries=0)))


def test_ranks_read_shards_of_their_own_and_all_are_looked_at(corpus: Path, tmp_path: Path):
    folder = tmp_path / "train"
    shutil.copytree(corpus / "shards" / "train", folder)
    for rank in range(3):
        [one] = disks.reading(node(folder, corpus / "shards" / "validation", rank=rank, size=3))
        assert one.value is not None
        assert one.value > 0
    with open(folder / "shard-000001.tar", "ab") as file:
        file.write(b"more")
    (folder / "shard-000002.idx").unlink()
    with pytest.raises(
        DataError, match=r"2 of \d+ shards(?s:.*)shard-000001.tar, shard-000002.tar"
    ):
        list(disks.reading(node(folder)))


def test_a_package_out_of_range_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = tmp_path / "setup.cfg"
    setup.write_text(
        "[options]\ninstall_requires =\n    numpy>=99\n    torch>=2\n    nothing>=1; "
        "python_version < '3'\n"
    )
    monkeypatch.setattr(machine, "SETUP", setup)
    [one] = machine.packages(node())
    assert one.state == "fail"
    assert one.said.startswith("numpy 2")
    assert one.said.endswith("not >=99")


def test_what_a_control_group_leaves_is_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert 0 < machine.free_memory() < 2**50
    group = tmp_path / "slurm" / "job_7"
    group.mkdir(parents=True)
    (tmp_path / "slurm" / "memory.max").write_text("3000000\n")
    (tmp_path / "slurm" / "memory.current").write_text("1000000\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5\n")
    (tmp_path / "cgroup").write_text("0::/slurm/job_7\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    assert machine.free_memory() == 2_000_000


# ------------------------------------------------------------------------- what the driver answers
def test_a_gpu_with_errors_is_named_and_what_it_cannot_say_is_no_error():
    rows = rows_of("0, 0, No, [N/A]\n1, 2, No, Yes\n")
    meanings = ["memory errors", "a lost row", "a row to be replaced"]
    assert complaints(rows, meanings) == ["GPU 1: memory errors", "GPU 1: a row to be replaced"]
    hot = rows_of("0, Not Active, Active, Active\n")
    assert complaints(hot, ["power", "too hot", "too hot"]) == ["GPU 0: too hot"]


def test_errors_in_the_kernels_log_are_counted():
    log = """[  12.1] NVRM: loading NVIDIA UNIX x86_64 Kernel Module
[ 813.5] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', GPU has fallen off the bus.
[ 814.5] NVRM: Xid (PCI:0000:3b:00): 79, pid=812, GPU has fallen off the bus.
[ 900.0] NVRM: Xid (PCI:0000:86:00): 63, pid=9, Row Remapper: new row marked"""
    assert xids_of(log) == ["79 (PCI:0000:3b:00, 2x)", "63 (PCI:0000:86:00, 1x)"]
