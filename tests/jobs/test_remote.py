"""Runs from a URL, through the command line: the same batches and losses as from the folder, and
what is refused before a run starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.errors import DataError
from launch.commands import shards
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train
from tests.helpers.web_server import Server, serve

pytestmark = pytest.mark.slow

SAME = ("step", "batch_digest", "loss", "tokens_seen", "validation_loss")


@pytest.fixture
def server(corpus: Path) -> Iterator[Server]:
    with serve(corpus / "shards") as server:
        yield server


def values(corpus: Path, root: Path, name: str, place: str, **data: Any) -> dict[str, Any]:
    return run_values(
        corpus,
        root,
        name,
        data={
            "lanes": 2,
            "block": 4,
            "sources": [{"shards": f"{place}/train"}],
            "validation": {"shards": f"{place}/validation", "every_steps": 30, "rows": 8},
            **data,
        },
        train={"steps": 30},
    )


def size_gb(corpus: Path, shards: float) -> float:
    """Return what holds so many of the shards."""
    return (
        max(tar.stat().st_size for tar in (corpus / "shards").rglob("*.tar")) * shards * 1.06 / 1e9
    )


def test_a_run_from_a_url_is_the_run_from_the_folder(
    corpus: Path, server: Server, tmp_path: Path
) -> None:
    """On two ranks, with a cache for fewer shards than there are; the server stumbles now and
    then.
    """
    server.statuses, server.drops = [503, 500], [100_000]
    cache = {"folder": str(tmp_path / "cache"), "size_gb": size_gb(corpus, 5)}
    (tmp_path / "run.yaml").write_text(
        yaml.dump(values(corpus, tmp_path, "far", server.url, cache=cache))
    )
    hfscale("pretrain", tmp_path / "run.yaml", "--procs", 2)
    far = [
        json.loads(line) for line in (tmp_path / "far" / "metrics.jsonl").read_text().splitlines()
    ]
    near, _ = run_ranks(train, 2, values(corpus, tmp_path, "near", str(corpus / "shards")))
    assert len(far) == 30
    assert [{key: record.get(key) for key in SAME} for record in far] == [
        {key: record.get(key) for key in SAME} for record in near
    ]
    assert (
        sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.[ti][ad][rx]"))
        <= cache["size_gb"] * 1e9
    )
    rebuilt = hfscale("batch", tmp_path / "far", "--step", 3).stdout  # with the cache of the run
    assert f"{far[2]['batch_digest']}" in rebuilt


def test_what_cannot_work_is_refused_before_a_run_starts(
    corpus: Path, server: Server, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.dump(
            values(
                corpus,
                tmp_path,
                "run",
                server.url,
                cache={"folder": str(tmp_path / "cache"), "retries": 0},
            )
        )
    )
    (tmp_path / "file").touch()
    smallest = f"{size_gb(corpus, 0.5):.9f}"
    for override, *words in [
        (
            f"data.cache.size_gb={smallest}",
            "too small for one shard",
            "shard-000000.tar takes up to",
        ),
        (
            f"data.cache.folder={tmp_path}/file/cache",
            "the cache cannot be written",
            "data.cache.folder",
            "file/cache",
        ),
        (f"data.validation.shards={server.url}/nowhere", "cannot fetch", "nowhere/manifest.json"),
        (
            "data.sources.0.shards=http://127.0.0.1:1/x",
            "cannot fetch",
            "http://127.0.0.1:1/x/manifest.json",
        ),
        ("data.sources.0.shards=pipe:cat /tmp/{}", "cat /tmp/{}", "data.allow_pipe=true"),
    ]:
        done = hfscale("pretrain", config, override, "--dry-run", check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "run").exists()


def stopped_by(values: dict[str, Any]) -> str:
    """Return what stopped a run; for ``run_ranks``."""
    try:
        train(values)
    except DataError as error:
        return str(error)
    return "done"


def test_a_shard_that_cannot_be_had_stops_the_run_or_is_skipped_alike(
    corpus: Path, server: Server, tmp_path: Path
) -> None:
    for tar in sorted((corpus / "shards" / "train").glob("*.tar"))[::2]:
        server.files[f"train/{tar.name}"] = b"something else"
    cache = {"folder": str(tmp_path / "cache"), "retries": 0}
    # the launcher ends the others
    [error] = run_ranks(stopped_by, 1, values(corpus, tmp_path, "run", server.url, cache=cache))
    assert "not the one of the manifest" in error and f"{server.url}/train/shard-" in error
    skipping = {"on_error": "skip", "max_skipped": 0.9, "cache": cache}
    [alone], (first_rank, _) = (
        run_ranks(train, size, values(corpus, tmp_path, f"skip-{size}", server.url, **skipping))
        for size in (1, 2)
    )
    assert 0 < alone[-1]["skipped_rows"] == first_rank[-1]["skipped_rows"]
    assert [record["batch_digest"] for record in alone] == [
        record["batch_digest"] for record in first_rank
    ]


def test_shards_of_a_url_are_verified_counted_and_printed(
    corpus: Path,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    near = corpus / "shards" / "train"

    def said(verb: str, *arguments: object) -> list[str]:
        """Return what a verb prints of the URL, after checking that it is what it prints of the
        folder.
        """
        printed = []
        for place in (f"{server.url}/train", str(near)):
            with pytest.raises(SystemExit) as ended:
                shards.app([verb, place, *map(str, arguments)])
            assert ended.value.code == 0
            printed.append(
                [
                    line
                    for line in capsys.readouterr().out.splitlines()
                    if str(tmp_path) not in line and str(near) not in line
                ]
            )
        assert printed[0] == printed[1]
        return printed[0]

    assert said("verify") == []
    assert (tmp_path / "hfscale" / "shards").is_dir()
    assert any("tokens a document" in line for line in said("stats"))
    assert said("cat", "--document", 3, "--tokenizer", corpus / "tokenizer")
    assert said("cat", "--row", 5, "--seq-len", 32, "--tokenizer", corpus / "tokenizer")
    server.files[f"train/{sorted(near.glob('*.tar'))[0].name}"] = b"something else"
    done = hfscale(
        "shards",
        "verify",
        f"{server.url}/train",
        env={"XDG_CACHE_HOME": str(tmp_path / "new")},
        check=False,
    )
    assert done.returncode == 2 and "not the one of the manifest" in done.stderr
