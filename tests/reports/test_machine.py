"""What a rank of the doctor says of shards here and at a URL, and of packages out of range."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfscale.dist.world import Place, World
from hfscale.errors import DataError
from hfscale.reports import machine
from tests.helpers.web_server import serve


def shards(*paths: object, **remote: object) -> SimpleNamespace:
    return SimpleNamespace(shards=list(map(str, paths)), remote=remote)


def test_shards_of_a_url_are_sampled_and_not_kept(corpus: Path, tmp_path: Path):
    with serve(corpus / "shards") as server:
        [one] = machine.reading(shards(f"{server.url}/train", folder=tmp_path, retries=0), World())
        assert one.unit == "MB/s a rank"
        assert one.value  # how fast that is, is the machine's affair
        assert sum(server.asked.values()) == 2, "a manifest and a piece of a shard"
        assert list(tmp_path.rglob("*.tar*")) == []
        server.statuses = [503, 503]
        with pytest.raises(DataError, match="503"):
            list(
                machine.reading(shards(f"{server.url}/train", folder=tmp_path, retries=0), World())
            )


def test_ranks_read_shards_of_their_own_and_all_are_looked_at(corpus: Path, tmp_path: Path):
    folder = tmp_path / "train"
    shutil.copytree(corpus / "shards" / "train", folder)
    for rank in range(3):
        [one] = machine.reading(
            shards(folder, corpus / "shards" / "validation"), World(Place(rank, 3))
        )
        assert one.value is not None
        assert one.value > 0
    with open(folder / "shard-000001.tar", "ab") as file:
        file.write(b"more")
    (folder / "shard-000002.idx").unlink()
    with pytest.raises(
        DataError, match=r"2 of \d+ shards(?s:.*)shard-000001.tar, shard-000002.tar"
    ):
        list(machine.reading(shards(folder), World()))


def test_a_package_out_of_range_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = tmp_path / "setup.cfg"
    setup.write_text(
        "[options]\ninstall_requires =\n    numpy>=99\n    torch>=2\n    nothing>=1; "
        "python_version < '3'\n"
    )
    monkeypatch.setattr(machine, "SETUP", setup)
    [one] = machine.packages(None, World())
    assert one.state == "fail"
    assert one.said.startswith("numpy 2")
    assert one.said.endswith("not >=99")
