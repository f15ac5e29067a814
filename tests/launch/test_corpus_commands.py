"""``hfscale tokenizer`` and ``hfscale shards`` as a user types them: from text to verified shards,
and one screen for a mistake.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.helpers.cli import hfscale

pytestmark = pytest.mark.slow
CONFIG = """
source: {path: text}
split: {validation: 0.2}
tokenizer: {path: data/tokenizer, vocab_size: 300}
shards: {path: data/shards, shard_mb: 0.004, chunk_mb: 0.002, procs: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "text").mkdir()
    for k in range(40):
        (folder / "text" / f"{k:02d}.txt").write_text(f"document {k} 文件 " * 40)
    (folder / "text" / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "corpus.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def built(folder: Path) -> Path:
    first = hfscale("tokenizer", "train", "corpus.yaml", cwd=folder)
    assert "1 not UTF-8 (latin.txt)" in first.stdout
    assert "bytes a token" in first.stdout
    assert "was trained already" in hfscale("tokenizer", "train", "corpus.yaml", cwd=folder).stdout
    done = hfscale("shards", "build", "corpus.yaml", cwd=folder)
    said = (
        "41 documents read; left out: 0 duplicates, 0 empty, 0 invalid (half of a character), "
        "1 not UTF-8 (latin.txt); kept: 40"
    )
    assert said in done.stdout
    assert said in hfscale("shards", "stats", "data/shards", cwd=folder).stdout
    assert '{"seen": {"documents": 41' in (folder / "data" / "shards" / "ledger.jsonl").read_text()
    return folder / "data" / "shards"


def test_verify_and_stats_of_both_sides(built: Path) -> None:
    assert hfscale("shards", "verify", built).stdout.count("good") == 2
    stats = hfscale("shards", "stats", built).stdout
    assert "nats a token" in stats
    assert stats.count("tokens a document: mean") == 2
    assert "drawn" in hfscale("shards", "stats", built, "--png", built / "lengths.png").stdout
    assert (built / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "文件" in hfscale("shards", "cat", built / "train").stdout


def test_damage_is_one_screen_and_exit_code_2(built: Path) -> None:
    path = built / "validation" / "shard-000000.tar"
    good = path.read_bytes()
    path.write_bytes(good[:700] + bytes([good[700] ^ 1]) + good[701:])
    done = hfscale("shards", "verify", built, check=False)
    path.write_bytes(good)
    assert done.returncode == 2
    assert "shard-000000.tar: its SHA-256 is not the one in the manifest" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("built")
def test_another_build_in_the_same_place_is_refused(folder: Path) -> None:
    done = hfscale(
        "shards", "build", "corpus.yaml", "split.validation=0.3", cwd=folder, check=False
    )
    assert done.returncode == 2
    assert "split.validation: there 0.2, now 0.3" in done.stderr


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    done = hfscale(
        "shards",
        "build",
        "corpus.yaml",
        "tokenizer.path=nowhere",
        "shards.path=other",
        cwd=folder,
        check=False,
    )
    assert done.returncode == 2
    assert "hfscale tokenizer train" in done.stderr
    assert not (folder / "other").exists()


def test_tars_of_others_are_indexed_beside_them(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "raw.tar", "w") as tar:
        for k in range(3):
            info = tarfile.TarInfo(f"{k}.txt")
            info.size = 5
            tar.addfile(info, io.BytesIO(b"hello"))
    assert "3 samples in 1 tars" in hfscale("shards", "index", "raw.tar", cwd=tmp_path).stdout
    assert "good" in hfscale("shards", "verify", tmp_path).stdout
    assert hfscale("shards", "index", "no.tar", cwd=tmp_path, check=False).returncode == 2
