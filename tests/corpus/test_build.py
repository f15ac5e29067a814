"""A build gives the same bytes however many processes made it and however often it was killed."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfscale.config.corpus import CorpusConfig, Split
from hfscale.corpus.build import build_shards
from hfscale.corpus.source import open_corpus
from hfscale.corpus.split import assign
from hfscale.corpus.tokenizer_training import train_tokenizer
from hfscale.errors import DataError
from hfscale.shards.counts import Counts
from hfscale.shards.manifest import Manifest
from hfscale.shards.reader import ShardReader
from hfscale.shards.verify import verify
from hfscale.tokenizer import load_tokenizer

RUN = (
    "import sys, json; from hfscale.config.corpus import CorpusConfig; from "
    "hfscale.corpus.build import build_shards; "
    "build_shards(CorpusConfig.model_validate_json(sys.argv[1]))"
)


def config(folder: Path, out: str = "shards", **shards: Any) -> CorpusConfig:
    return CorpusConfig.model_validate(
        {
            "source": {"path": str(folder / "text")},
            "split": {"validation": 0.2},
            "tokenizer": {"path": str(folder / "tokenizer"), "vocab_size": 400},
            "shards": {
                "path": str(folder / out),
                "shard_mb": 0.02,
                "chunk_mb": 0.005,
                "procs": 1,
                **shards,
            },
        }
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents in two languages, one of them twice, one empty, one not UTF-8, one far longer
    than a shard; a tokenizer.
    """
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(3)
    words = ["shard", "token", "学习", "模型", "loss", "gradient", "数据", "\n", "of", "the"]
    (folder / "text" / "sub").mkdir(parents=True)
    for k in range(120):
        length = 30_000 if k == 60 else rng.randint(1, 900)
        text = f"{k} " + " ".join(rng.choices(words, k=length))
        (folder / "text" / ("sub" if k % 3 else ".") / f"{k:03d}.txt").write_text(text)
    (folder / "text" / "zz_twice.txt").write_bytes((folder / "text" / "003.txt").read_bytes())
    (folder / "text" / "zz_empty.txt").write_text(" \n")
    (folder / "text" / "zz_latin.txt").write_bytes(b"caf\xe9")
    train_tokenizer(config(folder))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/*"))}


@pytest.fixture(scope="module")
def built(corpus: Path) -> dict[str, bytes]:
    build_shards(config(corpus))
    return content(corpus / "shards")


def tokens_of(manifest: Manifest) -> list[list[int]]:
    documents, carry = [], np.empty(0, np.int64)
    for entry in manifest.shards:
        reader = ShardReader(manifest.folder, entry, dtype=manifest.numpy_dtype)
        ids = np.empty(len(reader), np.int64)
        reader.read_tokens(0, len(reader), ids)
        *whole, rest = np.split(ids, reader.ends())
        for document in whole:
            documents.append(np.concatenate([carry, document]).tolist())
            carry = np.empty(0, np.int64)
        carry = np.concatenate([carry, rest])
    assert not len(carry)
    return documents


@pytest.mark.usefixtures("built")
def test_shards_hold_every_document_once_on_its_side(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    expected: dict[str, list[str]] = {"train": [], "validation": []}
    settings = config(corpus)
    for document in assign(open_corpus(settings.source).documents(), settings.split, Counts()):
        expected[document.side].append(document.text)
    assert sum(map(len, expected.values())) == 120
    for side, texts in expected.items():
        manifest = Manifest.load(corpus / "shards" / side)
        assert len(manifest.shards) >= 2
        documents = tokens_of(manifest)
        assert [tokenizer.decode(ids[:-1]) for ids in documents] == texts
        assert {ids[-1] for ids in documents} == {tokenizer.eos_token_id}
        assert manifest.source["seen"] == {
            "documents": 123,
            "duplicates": 1,
            "empty": 1,
            "invalid": 0,
            "undecodable": 1,
            "packed": 0,
            "missing": 0,
            "names": {"empty": ["zz_empty.txt"], "undecodable": ["zz_latin.txt"]},
        }
        assert verify(manifest, threads=2) == []


def test_two_processes_write_the_bytes_that_one_writes(
    corpus: Path, built: dict[str, bytes]
) -> None:
    build_shards(config(corpus, "two", procs=2))
    assert content(corpus / "two") == built


def test_a_finished_build_is_left_alone(corpus: Path, built: dict[str, bytes]) -> None:
    before = {file: file.stat().st_mtime_ns for file in (corpus / "shards").glob("*/*")}
    build_shards(config(corpus, procs=2))
    assert {file: file.stat().st_mtime_ns for file in (corpus / "shards").glob("*/*")} == before


def start(settings: CorpusConfig) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, settings.model_dump_json()], stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(corpus: Path, built: dict[str, bytes]) -> None:
    """An outside process kills the build five times, shortly after the ledger has grown by some
    lines; then it may finish.
    """
    ledger = corpus / "killed" / "ledger.jsonl"
    rng = random.Random(1)
    for kill in range(5):
        process = start(config(corpus, "killed", procs=1 + kill % 2))
        size = ledger.stat().st_size if ledger.exists() else 0
        while process.poll() is None and (not ledger.exists() or ledger.stat().st_size <= size):
            time.sleep(0.0002)
        time.sleep(rng.random() * 0.004)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL or kill > 2
    build_shards(config(corpus, "killed"))
    assert content(corpus / "killed") == built


@pytest.mark.parametrize("leave", range(1, 11, 2))
def test_every_state_that_a_crash_can_leave_is_continued(
    corpus: Path, built: dict[str, bytes], leave: int, tmp_path: Path
) -> None:
    """Keeps ``leave`` ledger lines of a whole build, with files that are ahead of it and a torn
    last line.
    """
    out = tmp_path / "shards"
    lines = (corpus / "shards" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > leave
    for name, data in built.items():
        if not name.endswith("manifest.json"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
    committed = {
        f"{line['side']}/{line['shard']['name']}" for line in map(json.loads, lines[1:leave])
    }
    ahead = sorted(name for name in built if name.endswith(".tar") and name not in committed)
    (out / ahead[0]).unlink()
    (out / ahead[-1]).write_bytes(b"half")
    (out / "train" / ".shard-000099.tar.tmp").write_bytes(b"half") if leave == 3 else None
    (out / "ledger.jsonl").write_bytes(b"".join(lines[:leave]) + lines[leave][:20])
    settings = config(corpus)
    build_shards(
        settings.model_copy(update={"shards": settings.shards.model_copy(update={"path": out})})
    )
    (out / "train" / ".shard-000099.tar.tmp").unlink(missing_ok=True)
    assert content(out) == built


def interrupted(corpus: Path, out: str) -> CorpusConfig:
    """A build of a copy of the text, with its manifests and all but two shards taken away."""
    folder = corpus / out
    subprocess.run(
        ["cp", "-r", corpus / "text", folder / "text"], check=True
    ) if folder.mkdir() is None else None
    settings = config(folder)
    settings = settings.model_copy(update={"tokenizer": config(corpus).tokenizer})
    build_shards(settings)
    for manifest in (folder / "shards").glob("*/manifest.json"):
        manifest.unlink()
    ledger = folder / "shards" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:4]))
    return settings


@pytest.mark.usefixtures("built")
def test_a_build_of_an_older_encoding_is_found_finished_and_never_mixed(corpus: Path) -> None:
    """Until then text that spelled a control token became one: such shards stay, and none are added
    to them.
    """
    settings = config(corpus, "older")
    shutil.copytree(corpus / "shards", settings.shards.path)
    first, *others = (settings.shards.path / "ledger.jsonl").read_text().splitlines(keepends=True)
    plan = json.loads(first)["plan"]
    assert plan.pop("encoding") == 2
    older = json.dumps({"plan": plan}) + "\n" + "".join(others)
    (settings.shards.path / "ledger.jsonl").write_text(older)
    assert build_shards(settings)["train"].documents > 0
    (settings.shards.path / "train" / "manifest.json").unlink()
    with pytest.raises(DataError, match="encoding: there None, now 2"):
        build_shards(settings)


@pytest.mark.parametrize("which", ["first", "cut"])
def test_a_source_that_changed_since_the_interruption_is_refused(corpus: Path, which: str) -> None:
    settings = interrupted(corpus, f"changed-{which}")
    train = [
        json.loads(line)
        for line in (settings.shards.path / "ledger.jsonl").read_bytes().splitlines()[1:]
    ]
    mark = next(line["mark"] for line in reversed(train) if line["side"] == "train")
    assert mark["offset"] > 0
    corpus_of = assign(open_corpus(settings.source).documents(), settings.split, Counts())
    text = [document.text for document in corpus_of if document.side == "train"][
        mark["documents"] if which == "cut" else 0
    ]
    file = next(
        file
        for file in Path(settings.source.path).rglob("*.txt")
        if file.read_bytes() == text.encode()
    )
    # same name, same size
    file.write_bytes(text[:-1].encode() + (b"?" if len(text[-1].encode()) == 1 else "？".encode()))
    with pytest.raises(DataError, match="has changed since this build was interrupted"):
        build_shards(settings)


def test_a_missing_committed_shard_is_reported(corpus: Path) -> None:
    settings = interrupted(corpus, "missing")
    (settings.shards.path / "train" / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match="missing or has another size"):
        build_shards(settings)


def test_a_damaged_ledger_is_refused(corpus: Path) -> None:
    (corpus / "torn").mkdir()
    (corpus / "torn" / "ledger.jsonl").write_text('{"plan": \n')
    with pytest.raises(DataError, match="ledger of a build is damaged"):
        build_shards(config(corpus, "torn"))


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shards": {"chunk_mb": 0.01}}, "shards.chunk_tokens: there 2500, now 5000"),
        ({"split": {"salt": "x"}}, "split.salt: there '', now 'x'"),
        ({"source": {"pattern": "*.txt"}}, r"source.files: there \d+, now \d+"),
    ],
)
def test_another_build_in_the_folder_is_refused(
    corpus: Path, built: dict[str, bytes], change: dict[str, Any], says: str
) -> None:
    values = config(corpus).model_dump()
    for section, update in change.items():
        values[section].update(update)
    with pytest.raises(DataError, match=says):
        build_shards(CorpusConfig.model_validate(values))
    assert content(corpus / "shards") == built


def test_a_folder_of_something_else_is_refused_and_left_as_it_was(corpus: Path) -> None:
    (corpus / "mine").mkdir()
    (corpus / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"not a build of shards(?s:.*)thesis.txt"):
        build_shards(config(corpus, "mine"))
    assert [file.name for file in (corpus / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("built")
def test_two_builds_at_once_are_refused(corpus: Path) -> None:
    with open(corpus / "shards" / "ledger.jsonl", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another build is writing here"):
            build_shards(config(corpus))


def test_no_text_and_an_empty_side_are_refused(corpus: Path) -> None:
    text = corpus / "few" / "text"
    text.mkdir(parents=True)
    settings = config(corpus / "few").model_copy(update={"tokenizer": config(corpus).tokenizer})
    with pytest.raises(DataError, match="no file matches"):
        build_shards(settings)
    (text / "a.txt").write_text("\n")
    with pytest.raises(DataError, match=r"holds no text(?s:.*)1 documents read(?s:.*) 1 empty"):
        build_shards(settings)
    (text / "a.txt").write_text("the only document")
    settings = settings.model_copy(
        update={"shards": settings.shards.model_copy(update={"path": corpus / "few" / "again"})}
    )
    with pytest.raises(DataError, match="none of 1 documents fell to the validation side"):
        build_shards(settings)
    for number in range(30):
        (text / f"{number}.txt").write_text(f"document {number}")
    settings = settings.model_copy(update={"split": Split(validation=1e-9)})
    with pytest.raises(
        DataError, match=r"none of 31 documents(?s:.*)split.validation=0.\d+ gives both sides some"
    ) as error:
        build_shards(settings)
    assert not (corpus / "few" / "again").exists(), "nothing was written, so nothing is in the way"
    works = float(re.search(r"validation=(0\.\d+)", str(error.value))[1])  # type: ignore[index]
    assert build_shards(settings.model_copy(update={"split": Split(validation=works)}))[
        "validation"
    ].documents


def test_a_full_disk_stops_the_build_with_the_room_that_is_left(
    corpus: Path, built: dict[str, bytes]
) -> None:
    settings = config(corpus, "full")
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, -1)); "
    )
    done = subprocess.run(
        [sys.executable, "-c", limited + RUN, settings.model_dump_json()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot write: File too large" in done.stderr
    assert "GB free there" in done.stderr
    build_shards(settings)
    assert content(corpus / "full") == built


@pytest.mark.slow
def test_workers_go_when_their_parent_is_killed(corpus: Path) -> None:
    process = start(config(corpus, "orphans", procs=2))
    children: list[int] = []
    while len(children) < 3 and process.poll() is None:  # two workers and the resource tracker
        children = [
            int(pid)
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        time.sleep(0.001)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_there_is_nothing_of_this_machine_in_the_manifest(
    corpus: Path, built: dict[str, bytes]
) -> None:
    assert os.fsencode(corpus.name) not in b"".join(built.values())
