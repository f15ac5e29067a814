"""Shards of a URL against real servers that misbehave: what comes is right, counted in bytes, and
what cannot come is named.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfscale.errors import ConfigError, DataError
from hfscale.shards import remote
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.open import open_manifest
from hfscale.shards.reader import ShardReader
from hfscale.shards.verify import verify
from hfscale.shards.writer import ShardWriter
from tests.helpers.cli import ROOT
from tests.helpers.web_server import Server, eventually, serve

BLOCK = 2**15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 256 kB of random tokens, in ``train``."""
    folder, entries = tmp_path_factory.mktemp("corpus"), list[ShardEntry]()
    writer = ShardWriter(
        folder / "train",
        name="s",
        dtype=np.dtype("<u2"),
        chunk_tokens=2**15,
        shard_chunks=4,
        committed=entries.append,
    )
    ids = np.random.default_rng(0).integers(1, 60_000, 2**19).astype("<u2")
    ids[1023::1024] = 0
    for document in np.split(ids, 512):
        writer.add(document)
    writer.close()
    Manifest(
        dtype="uint16", tokenizer=TokenizerInfo("t", 60_000, 0), source={}, shards=tuple(entries)
    ).save(folder / "train")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serve(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BLOCK": BLOCK,
        "LEAST_BLOCK": 2**10,
        "BACK_OFF_S": 0.02,
        "POLL_S": 0.01,
    }.items():
        monkeypatch.setattr(remote, name, value)


def load(server: Server, cache: Path, **options: Any) -> Manifest:
    return open_manifest(f"{server.url}/train", folder=cache, **options)


def fetch(manifest: Manifest, *numbers: int) -> None:
    for number in numbers:
        with manifest.local(manifest.shards[number]):
            pass


def there(manifest: Manifest) -> list[int]:
    return [
        number
        for number, entry in enumerate(manifest.shards)
        if (manifest.folder / entry.name).exists()
    ]


def size_of(folder: Path) -> int:
    """Return the bytes of shards, indexes and parts; files may come and go meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        if file.suffix in (".tar", ".idx", ".part", ".tmp"):
            try:
                total += file.stat().st_size
            except FileNotFoundError:
                continue
    return total


# ---------------------------------------------------------------------------------------- transport
def test_a_reader_sees_a_local_folder_and_nothing_comes_twice(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    local, manifest = Manifest.load(folder / "train"), load(server, tmp_path)
    assert manifest == local and manifest.fingerprint == local.fingerprint
    assert there(manifest) == []
    ids, expected = (
        np.empty(len(range(100, 131_000)), np.int64),
        np.empty(len(range(100, 131_000)), np.int64),
    )
    for entry in manifest.shards:
        with manifest.local(entry):
            reader = ShardReader(manifest.folder, entry, dtype=manifest.numpy_dtype)
        reader.read_tokens(100, 131_000, ids)
        ShardReader(local.folder, entry, dtype=local.numpy_dtype).read_tokens(
            100, 131_000, expected
        )
        assert (ids == expected).all()
    again = load(server, tmp_path)
    fetch(again, 0, 1, 2, 3)
    assert verify(again, threads=2) == []
    assert {server.served[entry.name] for entry in local.shards} == {local.shards[0].bytes}
    assert server.asked["manifest.json"] == 2 and server.asked[local.shards[0].name] == -(
        -local.shards[0].bytes // BLOCK
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        {"statuses": [500, 503, 429, 408]},
        {"drops": [BLOCK // 2, 100, 0]},
        {"hangs": 2},
        {"rate": BLOCK},
        {"ranges": False},
        {"ranges": False, "drops": [5 * BLOCK]},
    ],
)
def test_every_fault_is_overcome(
    server: Server, folder: Path, tmp_path: Path, fault: dict[str, Any]
) -> None:
    manifest = load(server, tmp_path, timeout_s=0.5)
    for name, value in fault.items():
        setattr(server, name, value)
    if "rate" in fault:  # half a block in the time: smaller ones get through
        server.rate = BLOCK
        threading.Timer(1.5, setattr, (server, "rate", 0)).start()
    fetch(manifest, 1)
    entry = manifest.shards[1]
    assert (manifest.folder / entry.name).read_bytes() == (
        folder / "train" / entry.name
    ).read_bytes()
    assert not list(tmp_path.rglob("*.part"))
    # never all of it again for a block
    assert server.served[entry.name] <= entry.bytes + (5 if "ranges" in fault else 3) * BLOCK


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (403, 1), (401, 1), (500, 4)])
def test_what_cannot_be_had_is_named(
    server: Server, tmp_path: Path, status: int, asked: int
) -> None:
    manifest = load(server, tmp_path, retries=3)
    server.statuses = [status] * 10
    error = "FileNotFound" if status == 404 else f"ClientResponseError: {status}"
    named = f"{error}[\\s\\S]*{server.url}/train/s-000002.tar"
    with pytest.raises(DataError, match=f"cannot fetch, attempt {asked}: {named}"):
        fetch(manifest, 2)
    assert server.asked["s-000002.tar"] == asked
    server.statuses = []
    fetch(manifest, 2)  # the same again, once it is there


@pytest.mark.slow
def test_another_file_is_fetched_twice_and_then_refused(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    manifest = load(server, tmp_path)
    right = (folder / "train" / "s-000000.tar").read_bytes()
    for wrong in (right[:100_000], right[: BLOCK * 2], right[:-1] + b"!", b""):
        server.files["train/s-000000.tar"] = wrong
        with pytest.raises(DataError, match="not the one of the manifest|416") as caught:
            fetch(manifest, 0)
        assert f"{server.url}/train/s-000000.tar" in str(caught.value)
        if wrong:
            assert "256" in str(caught.value) and manifest.shards[0].digest in str(caught.value)
    server.files = {"train/s-000000.idx": (folder / "train" / "s-000001.idx").read_bytes()}
    with pytest.raises(DataError, match="not the one of the manifest"):
        fetch(manifest, 0)
    server.files = {}
    fetch(manifest, 0)
    assert (manifest.folder / "s-000000.tar").read_bytes() == right


def test_a_part_of_something_else_is_thrown_away(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    manifest = load(server, tmp_path)
    (manifest.folder / "s-000000.tar.part").write_bytes(b"x" * 200_000)
    (manifest.folder / "s-000001.tar.part").write_bytes(b"x" * 2_000_000)
    fetch(manifest, 0, 1)
    for name in ("s-000000.tar", "s-000001.tar"):
        assert (manifest.folder / name).read_bytes() == (folder / "train" / name).read_bytes()


FETCHER = f"""
import sys
from pathlib import Path
from hfscale.shards import remote
from hfscale.shards.open import open_manifest
remote.BLOCK = {BLOCK}
manifest = open_manifest(sys.argv[1], folder=Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for number in sys.argv[3].split(","):
    with manifest.local(manifest.shards[int(number)]):
        pass
"""


def fetcher(server: Server, cache: Path, numbers: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", FETCHER, f"{server.url}/train", str(cache), numbers],
        cwd=ROOT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_killed_download_goes_on_from_its_part(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    process = fetcher(server, tmp_path, "3")
    server.pause_at = 150_000
    go(process)
    name = "s-000003.tar"
    eventually(lambda: sum(part.stat().st_size for part in tmp_path.rglob("*.part")) >= 4 * BLOCK)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    server.pause_at = None
    [part] = tmp_path.rglob("*.part")
    assert part.stat().st_size < 262_144
    manifest = load(server, tmp_path)
    fetch(manifest, 3)  # the lock of the killed is free
    assert (manifest.folder / name).read_bytes() == (folder / "train" / name).read_bytes()
    # what was on its way, not what was there
    assert server.served[name] <= manifest.shards[3].bytes + 4 * BLOCK


@pytest.mark.slow
def test_two_processes_share_a_cache(server: Server, tmp_path: Path) -> None:
    server.rate = 2_000_000
    processes = [
        fetcher(server, tmp_path, numbers) for numbers in ("0,1,2,3", "0,1,2,3", "3,2,1,0")
    ]
    for process in processes:
        go(process)
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    manifest = load(server, tmp_path)
    assert [server.served[entry.name] for entry in manifest.shards] == [
        entry.bytes for entry in manifest.shards
    ]


def test_pipes_give_the_files(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "it's a folder"
    source.symlink_to(folder / "train")
    url = f'pipe:cd "{source}" && cat {{}}'
    with pytest.raises(
        ConfigError,
        match=r"needs permission[\s\S]*s a folder. && cat {}[\s\S]*data.allow_pipe=true",
    ):
        open_manifest(url)
    manifest = open_manifest(url, folder=tmp_path / "cache", allow_pipe=True, retries=1)
    fetch(manifest, 0, 3)
    assert (manifest.folder / "s-000003.tar").read_bytes() == (
        folder / "train" / "s-000003.tar"
    ).read_bytes()
    source.unlink()
    with pytest.raises(DataError, match=r"attempt 2: CalledProcessError[\s\S]*s-000001.idx"):
        fetch(manifest, 1)


# ----------------------------------------------------------------------------------------- manifest
def test_the_newest_manifest_counts_and_the_cached_one_where_there_is_no_server(
    server: Server, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = load(server, tmp_path)
    fetch(old, 0)
    content = json.loads((folder / "train" / "manifest.json").read_text())
    server.files["train/manifest.json"] = json.dumps(
        content | {"source": {"of": "another day"}}
    ).encode()
    new = load(server, tmp_path)
    assert new.fingerprint != old.fingerprint and there(new) == [] and there(old) == [0]
    server.gone = True
    offline = load(server, tmp_path)
    assert offline.fingerprint == new.fingerprint
    assert "going on with the manifest in the cache" in caplog.text
    with pytest.raises(DataError, match="cannot fetch, attempt 7"):
        load(server, tmp_path / "empty")


def test_what_is_no_manifest_is_named(server: Server, tmp_path: Path) -> None:
    server.files["train/manifest.json"] = b"<html>Please log in</html>"
    with pytest.raises(DataError, match=r"not JSON[\s\S]*/train-"):
        load(server, tmp_path)
    server.files = {}
    with pytest.raises(
        DataError, match=rf"FileNotFoundError[\s\S]*{server.url}/nothing/manifest.json"
    ):
        open_manifest(f"{server.url}/nothing/", folder=tmp_path)


@pytest.mark.parametrize("name", ["../../elsewhere.tar", "/tmp/elsewhere.tar", "manifest.json"])
def test_a_manifest_cannot_write_outside_of_the_cache(
    server: Server, folder: Path, tmp_path: Path, name: str
) -> None:
    content = json.loads((folder / "train" / "manifest.json").read_text())
    content["shards"][0]["name"] = name
    server.files["train/manifest.json"] = json.dumps(content).encode()
    with pytest.raises(
        DataError, match=f"a remote shard must be a .tar beside its manifest[\\s\\S]*{name}"
    ):
        load(server, tmp_path)


def test_a_url_names_a_folder_or_a_file(server: Server, tmp_path: Path) -> None:
    assert (
        len(
            {
                open_manifest(f"{server.url}/train{end}", folder=tmp_path).folder
                for end in ("", "/", "/manifest.json")
            }
        )
        == 1
    )


@pytest.mark.slow
# --------------------------------------------------------------------------------------------- room
def test_the_limit_holds_and_the_least_recently_used_goes(server: Server, tmp_path: Path) -> None:
    foreign = tmp_path / "shards" / "foreign.tar"
    foreign.parent.mkdir()
    foreign.write_bytes(b"mine")
    manifest = load(server, tmp_path, size_gb=600e-6)  # two shards
    fetch(manifest, 0, 1)
    assert there(manifest) == [0, 1]
    time.sleep(0.02)  # more than the granularity of the time of a file
    fetch(manifest, 0)  # used again
    fetch(manifest, 2)
    assert there(manifest) == [0, 2]
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most.append(size_of(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    server.rate = 3_000_000
    with ThreadPoolExecutor(3) as pool:
        list(
            pool.map(
                lambda numbers: fetch(load(server, tmp_path, size_gb=600e-6), *numbers),
                [(0, 1, 2, 3), (3, 1, 0, 2), (2, 0, 3, 1)],
            )
        )
    done.set()
    watcher.join()
    assert 262_144 < max(most) <= 600_000
    assert foreign.read_bytes() == b"mine"


def test_a_removed_shard_stays_readable_where_it_is_open(server: Server, tmp_path: Path) -> None:
    manifest = load(server, tmp_path, size_gb=300e-6)
    with manifest.local(manifest.shards[0]):
        reader = ShardReader(manifest.folder, manifest.shards[0], dtype=manifest.numpy_dtype)
    fetch(manifest, 1)
    assert there(manifest) == [1]
    ids = np.empty(1000, np.int64)
    reader.read_tokens(100_000, 101_000, ids)
    assert ids.any()


def test_who_finds_no_room_waits_for_others_that_are_fetching(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hfscale")
    first, second = (load(server, tmp_path, size_gb=300e-6) for _ in range(2))
    server.pause_at = 0
    with ThreadPoolExecutor(2) as pool:
        fetched = [pool.submit(fetch, first, 0, 1)]
        eventually(lambda: server.asked["s-000000.tar"])
        fetched.append(pool.submit(fetch, second, 2))
        eventually(lambda: "waiting for room" in caplog.text)
        server.pause_at = None
        assert [future.result(60) for future in fetched] == [None, None]
    fetch(second, 3)
    assert there(second) == [3]


def test_a_cache_that_cannot_be_used_is_refused(server: Server, tmp_path: Path) -> None:
    sizes = r"s-000000.tar takes up to [\d,]+ bytes, the cache has 100,000"
    with pytest.raises(
        ConfigError, match=rf"too small for one shard[\s\S]*data.cache.size_gb[\s\S]*{sizes}"
    ):
        load(server, tmp_path, size_gb=100e-6)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ConfigError, match=r"cannot be written: Not a directory[\s\S]*data.cache.folder"
    ):
        load(server, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"cannot be written[\s\S]*/proc/nowhere"):
        load(server, Path("/proc/nowhere"))


def test_a_cancelled_fetch_ends_soon(server: Server, tmp_path: Path) -> None:
    manifest = load(server, tmp_path, timeout_s=0.3, retries=10**6)
    server.pause_at = 100_000  # for good
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(fetch, manifest, 0)
        eventually(lambda: server.asked["s-000000.tar"] > 4)  # it tries again and again
        manifest.remote.cancelled.set()
        with pytest.raises(CancelledError):
            fetching.result(60)


@pytest.mark.slow
# -------------------------------------------------------------------------------------- other kinds
def test_s3(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto's S3 server, found by the standard variables."""
    import s3fs
    from moto.server import ThreadedMotoServer

    with ExitStack() as stack:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        stack.callback(server.stop)
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        bucket = s3fs.S3FileSystem()
        bucket.mkdir("corpus")
        bucket.put(f"{folder}/train/", "corpus/mine/train/", recursive=True)
        manifest = open_manifest("s3://corpus/mine/train", folder=tmp_path, retries=1)
        fetch(manifest, 0, 2)
        assert (manifest.folder / "s-000002.tar").read_bytes() == (
            folder / "train" / "s-000002.tar"
        ).read_bytes()
        (manifest.folder / "s-000001.tar.part").write_bytes(
            (folder / "train" / "s-000001.tar").read_bytes()[:100_000]
        )
        fetch(manifest, 1)
        bucket.pipe("corpus/mine/train/s-000003.tar", b"short" * 10_000)
        with pytest.raises(
            DataError,
            match=r"not the one of the "
            r"manifest[\s\S]*corpus/mine/train/s-000003.tar[\s\S]*50,000 bytes",
        ):
            fetch(manifest, 3)
        bucket.rm("corpus/mine/train/s-000003.tar")
        with pytest.raises(DataError, match=r"attempt 1: FileNotFoundError[\s\S]*s-000003.tar"):
            fetch(manifest, 3)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"s3fs[\s\S]*pip install 'hfscale\[s3\]'"):
        open_manifest("s3://bucket/train")
    with pytest.raises(ConfigError, match=r"cannot be opened[\s\S]*carrier"):
        open_manifest("carrier://pigeon/train")


def test_a_folder_of_this_machine_may_be_a_url(folder: Path, tmp_path: Path) -> None:
    """File systems that are not asynchronous know no timeout."""
    manifest = open_manifest(f"file://{folder}/train", folder=tmp_path)
    fetch(manifest, 0)
    assert there(manifest) == [0]
