"""Every kind of damage is found and named by the reader and by ``shards verify``, and can be
skipped without losing more than it hit.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest

from hfscale.errors import DataError
from hfscale.shards.manifest import Manifest
from hfscale.shards.reader import ShardReader
from hfscale.shards.verify import verify
from hfscale.stream.prepared import FILLER_ID
from hfscale.stream.rows import TokenRows
from tests.helpers.damage import CHUNK_TOKENS, CHUNKS, HURT, KINDS, SHARDS, write_shards

SEQ = 16
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_the_reader_names_it(tmp_path: Path, kind: str) -> None:
    write_shards(tmp_path)
    KINDS[kind].do(tmp_path)
    manifest = Manifest.load(tmp_path)
    entry = manifest.shards[HURT]
    with pytest.raises(DataError, match=rf"{KINDS[kind].reader}[\s\S]*s-{HURT:06d}"):
        ShardReader(tmp_path, entry, dtype=manifest.numpy_dtype).read_tokens(
            0, entry.tokens, np.empty(entry.tokens, np.int64)
        )


@kinds
def test_verify_names_it_and_nothing_else(tmp_path: Path, kind: str) -> None:
    write_shards(tmp_path)
    KINDS[kind].do(tmp_path)
    findings = verify(Manifest.load(tmp_path), threads=2)
    about = [finding for finding in findings if f"s-{HURT:06d}.tar: " in finding]
    assert re.search(KINDS[kind].verify, "\n".join(about)), findings
    assert kind == "a manifest of another build" or about == findings


@kinds
def test_skipping_loses_the_rows_that_touch_it_and_no_other(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hfscale"), "propagate", True)
    for name in ("whole", "hurt"):
        write_shards(tmp_path / name)
    KINDS[kind].do(tmp_path / "hurt")
    whole, hurt = (
        TokenRows(tmp_path / "whole", seq_len=SEQ),
        TokenRows(tmp_path / "hurt", seq_len=SEQ, skip=True),
    )
    np.testing.assert_array_equal(hurt.shard_rows, whole.shard_rows)
    shards, rows = (
        np.repeat(np.arange(SHARDS), whole.shard_rows),
        np.concatenate([np.arange(n) for n in whole.shard_rows]),
    )
    expected, ids = (np.full((len(rows), SEQ + 1), -1) for _ in range(2))
    assert whole.fill(shards, rows, expected).all()
    expected_ends = whole.prepare(shards, rows, documents_per=1).boundaries
    hit = [
        shard for shard in range(SHARDS) if shard == HURT or kind == "a manifest of another build"
    ]
    lost = np.array(
        [
            shard in hit
            and any(
                first // CHUNK_TOKENS <= chunk <= (first + SEQ) // CHUNK_TOKENS
                for chunk in KINDS[kind].lost
            )
            for shard, first in zip(shards, rows * SEQ, strict=True)
        ]
    )
    mixed = np.random.default_rng(0).permutation(len(rows))
    for part in np.array_split(mixed, 5):
        some = ids[part]
        prepared = hurt.prepare(shards[part], rows[part], documents_per=1)
        np.testing.assert_array_equal(prepared.valid, ~lost[part])
        prepared.fill(slice(0, len(part)), some)
        ids[part] = some
        for k, boundaries in zip(part, prepared.boundaries, strict=True):
            assert boundaries.tolist() == ([] if lost[k] else expected_ends[k].tolist())
    np.testing.assert_array_equal(ids, np.where(lost[:, None], FILLER_ID, expected))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(hurt.damage) == len(set(said)), "each bad chunk once"
    assert {shard for shard, _ in hurt.damage} == set(hit)
    assert {chunk for _, chunk in hurt.damage} == (
        set(KINDS[kind].lost) if len(KINDS[kind].lost) < CHUNKS else {-1}
    )
    assert all(
        f"s-{shard:06d}" in text for shard, text in zip(sorted(hit), sorted(said), strict=False)
    )


def test_a_cut_shard_says_where_it_ends(tmp_path: Path) -> None:
    write_shards(tmp_path)
    KINDS["cut inside a payload"].do(tmp_path)
    rows = TokenRows(tmp_path, seq_len=SEQ, skip=True)
    rows.fill(
        np.array([HURT]), np.array([2 * CHUNK_TOKENS // SEQ + 1]), np.empty((1, SEQ + 1), np.int64)
    )
    assert re.search(
        r"000000002\.tokens\.bin at offset [\d,]+ \(512 bytes\) is cut off: the shard ends at",
        rows.damage[HURT, 2].what,
    )


def test_a_manifest_of_another_dtype_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("uint16", "uint32"))
    manifest = Manifest.load(tmp_path)
    with pytest.raises(DataError, match="manifest says uint32"):
        ShardReader(tmp_path, manifest.shards[0], dtype=manifest.numpy_dtype)
    assert "the manifest says uint32" in "\n".join(verify(manifest, threads=1))
