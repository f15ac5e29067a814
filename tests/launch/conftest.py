"""A Slurm cluster; a folder with what a launcher looks at before it starts ranks: a config, a
manifest, a tokenizer's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from tests.helpers.needs import lacking
from tests.helpers.slurm import Cluster, missing, running

CONFIG = """\
run: {name: first}
tokenizer: {path: ./tokenizer}
data: {seq_len: 32, sources: [{shards: shards}]}
model: {architecture: gpt2, config: {n_layer: 3, n_head: 2, n_embd: 16}}
objective: {name: clm}
engine: {precision: fp32}
train: {steps: 10, global_batch: 8, micro_batch: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "shards").mkdir()
    shard = ShardEntry(
        name="shard-000000.tar", bytes=1024, tokens=4000, documents=3, digest="0", max_id=9
    )
    for name in (shard.name, shard.index_name):
        (tmp_path / "shards" / name).touch()
    made_by = TokenizerInfo(digest="0", vocab_size=10, eod_id=0)
    Manifest(dtype="uint16", tokenizer=made_by, source={}, shards=(shard,)).save(
        tmp_path / "shards"
    )
    return tmp_path


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm cluster of four nodes, for this pytest worker alone."""
    if reason := missing():
        lacking(reason)
    with running() as cluster:
        yield cluster
