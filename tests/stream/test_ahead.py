"""Streams of remote shards: what is fetched ahead, in which order and how much, and what a slow or
missing server does to training.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hfscale.dist.world import Place
from hfscale.errors import DataError
from hfscale.shards import remote
from hfscale.shards.open import open_manifest
from hfscale.shards.reader import ShardReader
from hfscale.stream import ahead, loader
from hfscale.stream.loader import Stream
from hfscale.stream.rows import TokenRows
from tests.helpers.orders import order_of
from tests.helpers.web_server import Server, eventually, serve

SEQ, BATCH = 32, 16


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a reader that prepares two steps ahead, as it does where steps are larger."""
    for module, name, value in [
        (remote, "BACK_OFF_S", 0.02),
        (remote, "POLL_S", 0.01),
        (ahead, "ROUND_S", 0.021),
        (loader, "PLAN_ROWS", BATCH),
    ]:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def server(make_corpus) -> Iterator[Server]:
    """Ten shards of 3,000 tokens, about 10 kB with their index."""
    with serve(make_corpus(tokens=30_000, chunk_tokens=1000, shard_chunks=3).folder) as server:
        yield server


class Rounds(threading.Event):
    """Counts the rounds of the thread that fetches ahead: it waits between them."""

    rounds = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.rounds += timeout == ahead.ROUND_S
        return super().wait(timeout)


def open_stream(
    url: str | Path, *, lanes: int = 1, block: int = 1, skip: bool = False, **options
) -> tuple[Stream, TokenRows]:
    rows = TokenRows(open_manifest(url, **options), seq_len=SEQ, skip=skip)
    if rows.manifest.remote:
        rows.manifest.remote.cancelled = Rounds()
    return Stream(
        rows,
        order_of(rows.shard_rows, seed=1, lanes=lanes, block=block),
        global_batch=BATCH,
        micro_batch=BATCH,
        place=Place(),
    ), rows


def take(stream: Stream, steps: int) -> None:
    for _ in range(steps):
        stream.take()
        stream.advance()


def here(rows: TokenRows) -> list[str]:
    return sorted(file.name for file in rows.manifest.folder.glob("*.tar"))


def settle(rows: TokenRows) -> None:
    """Return when the thread has looked ahead once more, from here to the end, and so has fetched
    all that it wants.
    """
    after = rows.manifest.remote.cancelled.rounds + 2
    eventually(lambda: rows.manifest.remote.cancelled.rounds >= after)


def test_a_stream_of_a_url_is_the_stream_of_the_folder(server: Server, tmp_path: Path) -> None:
    """Also with a cache that holds a third of the corpus, over two epochs."""
    entry = TokenRows(server.folder, seq_len=SEQ).manifest.shards[0]
    (local, _), (far, rows) = (
        open_stream(server.folder, lanes=2, block=8),
        open_stream(server.url, lanes=2, block=8, folder=tmp_path, size_gb=4.2 * entry.bytes / 1e9),
    )
    for _ in range(2 * 930 // BATCH):
        [expected], [batch] = local.take(), far.take()
        assert (expected.ids_BL == batch.ids_BL).all()
        local.advance()
        far.advance()
        assert len(here(rows)) <= 4
    assert local.state() == far.state()
    local.close()
    far.close()


def test_shards_come_in_the_order_of_first_use_as_many_as_the_share_holds(
    server: Server, tmp_path: Path
) -> None:
    stream, rows = open_stream(server.url, folder=tmp_path, size_gb=60e-6)
    settle(rows)
    order = order_of(rows.shard_rows, seed=1, lanes=1, block=1)
    in_order = [
        f"text-{shard:06d}.tar"
        for shard in dict.fromkeys(order.locate(np.arange(order.rows)).shard.tolist())
    ]
    fetched = [name for name in server.order if name.endswith(".tar")]
    size = rows.manifest.shards[0].bytes
    assert fetched == in_order[: int(ahead.SHARE * 60_000 / size)]
    take(stream, 3 * order.rows // 10 // BATCH)  # three shards
    settle(rows)
    fetched = [name for name in server.order if name.endswith(".tar")]
    assert (
        fetched == in_order[: len(fetched)] and len(fetched) >= int(ahead.SHARE * 60_000 / size) + 2
    )
    # what is to come stays, what was trained on went
    assert set(in_order[4 : len(fetched)]) <= set(here(rows))
    assert max(server.asked[name] for name in fetched) == 1
    stream.close()


def test_training_waits_for_the_server_and_not_where_the_cache_is_ahead(
    server: Server, tmp_path: Path
) -> None:
    server.pause_at = 0
    stream, rows = open_stream(server.url, folder=tmp_path)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(take, stream, 1)
        eventually(lambda: any(name.endswith(".tar") for name in server.asked))
        assert not first.done()
        server.pause_at = None
        first.result(60)
    settle(rows)
    server.gone = True
    take(stream, int(rows.shard_rows.sum()) // BATCH - 1)
    stream.close()


def test_what_cannot_be_fetched_ahead_surfaces_when_it_is_needed(
    server: Server, tmp_path: Path
) -> None:
    order = order_of(TokenRows(server.folder, seq_len=SEQ).shard_rows, seed=1, lanes=1, block=1)
    shards = order.locate(np.arange(order.rows)).shard
    missing = int(shards[order.rows // 2])
    (server.folder / f"text-{missing:06d}.tar").rename(server.folder / "away")
    stream, _ = open_stream(server.url, folder=tmp_path)
    good = int(np.flatnonzero(shards == missing)[0]) // BATCH  # whole steps before it
    take(stream, good - 2)
    with pytest.raises(DataError, match=rf"FileNotFoundError[\s\S]*text-{missing:06d}.tar"):
        take(stream, 3)
    stream.close()
    stream, rows = open_stream(server.url, folder=tmp_path, skip=True)
    skipped = 0
    for _ in range(order.rows // BATCH):
        [batch] = stream.take()
        skipped += int((~batch.valid_B).sum())
        stream.advance()
    stream.close()
    assert skipped == rows.shard_rows[missing] and list(rows.damage) == [(missing, -1)]


def test_a_stream_closes_while_the_server_is_silent(server: Server, tmp_path: Path) -> None:
    server.pause_at = 0  # for good: who waited for it would never come back
    stream, _ = open_stream(server.url, folder=tmp_path, timeout_s=0.3, retries=10**6)
    eventually(lambda: any(name.endswith(".tar") for name in server.asked))
    closing = threading.Thread(target=stream.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive() and "stream-ahead" not in [
        thread.name for thread in threading.enumerate()
    ]


def test_a_cache_too_small_for_the_lanes_is_told(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream, rows = open_stream(server.url, lanes=16, folder=tmp_path, size_gb=30e-6)
    for _ in range(4):
        take(stream, 1)
        assert sum(file.stat().st_size for file in rows.manifest.folder.glob("*.tar")) <= 30_000
    stream.close()
    assert caplog.text.count("too small for these lanes") == 1


def test_a_shard_that_was_removed_is_let_go(server: Server, tmp_path: Path) -> None:
    rows = TokenRows(open_manifest(server.url, folder=tmp_path, size_gb=30e-6), seq_len=SEQ)
    ids = np.empty((1, SEQ + 1), np.int64)
    for shard in range(10):
        rows.fill(np.array([shard]), np.array([0]), ids)
        reader = ShardReader(
            server.folder, rows.manifest.shards[shard], dtype=rows.manifest.numpy_dtype
        )
        expected = np.empty(SEQ + 1, np.int64)
        reader.read_tokens(0, SEQ + 1, expected)
        assert (ids[0] == expected).all() and len(rows._open) <= 3
