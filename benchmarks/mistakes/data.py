"""Mistakes in data, tokenizers, paths and disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.mistakes.config import put
from benchmarks.mistakes.place import Mistake, Place


def gone(suffix: str) -> Callable[[Place], None]:
    """Return what removes one file of the shards."""
    return lambda place: place.shard(suffix).unlink()


def cut(place: Place) -> None:
    """A copy that was broken off."""
    shard = place.shard(".tar")
    os.truncate(shard, place.rng.randrange(1, shard.stat().st_size // 512) * 512)


def flip(suffix: str) -> Callable[[Place], None]:
    """Return what flips one bit of one file of the shards."""

    def make(place: Place) -> None:
        file = place.shard(suffix)
        content = bytearray(file.read_bytes())
        content[place.rng.randrange(len(content))] ^= 1 << place.rng.randrange(8)
        file.write_bytes(content)

    return make


def manifest(change: Callable[[dict[str, object]], object]) -> Callable[[Place], None]:
    """Return what changes the manifest of the training shards."""

    def make(place: Place) -> None:
        file = place.train / "manifest.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return make


def other_tokenizer(place: Place) -> None:
    """A tokenizer that the shards were not made with: two of its merges change places."""
    file = place.folder / "tokenizer" / "tokenizer.json"
    values = json.loads(file.read_text())
    merges = values["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]
    file.write_text(json.dumps(values))


def disk(options: str) -> Callable[[Place], None]:
    """Return what puts the runs on a disk of their own."""

    def make(place: Place) -> None:
        root = place.folder / "runs"
        root.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", root], check=True)
        place.values["cluster"]["allow_local_disk"] = True

    return make


def reviews(change: Callable[[list[dict[str, object]]], object]) -> Callable[[Place], None]:
    """Return what changes the labelled examples."""

    def make(place: Place) -> None:
        file = place.folder / "reviews.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        change(rows)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return make


def foreign(place: Place) -> None:
    folder = place.folder / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()


def file_for_folder(place: Place) -> None:
    (place.folder / "runs").mkdir()
    (place.folder / "runs" / "mine").touch()


def write(path: str, content: str) -> Callable[[Place], None]:
    """Return what writes a file of the place."""
    return lambda place: (place.folder / path).write_text(content)


def remove(path: str) -> Callable[[Place], None]:
    """Return what removes a folder of the place."""
    return lambda place: shutil.rmtree(place.folder / path)


def half(path: str) -> Callable[[Place], None]:
    """Return what cuts a file of the place."""
    return lambda place: _halve(place.folder / path)


def second_line(place: Place, line: str) -> None:
    file = place.folder / "reviews.jsonl"
    lines = file.read_text().splitlines()
    lines[place.rng.randrange(1, len(lines))] = line
    file.write_text("\n".join(lines) + "\n")


SHARDS = [
    Mistake("the shards' folder is not there", remove("shards/train"), ("shards/train",)),
    Mistake("no manifest", lambda p: (p.train / "manifest.json").unlink(), ("manifest",)),
    Mistake("half a manifest", half("shards/train/manifest.json"), ("manifest",)),
    Mistake("a later manifest", manifest(lambda m: m.update(version=9)), ("version",)),
    Mistake("an empty manifest", manifest(lambda m: m.update(shards=[])), ("shards/train",)),
    Mistake("a shard is gone", gone(".tar"), (".tar",)),
    Mistake("an index is gone", gone(".idx"), (".idx",)),
    Mistake("a shard is cut off", cut, (".tar",)),
    Mistake("a bit of a shard has flipped", flip(".tar"), (".tar",)),
    Mistake("a bit of an index has flipped", flip(".idx"), (".idx",)),
    Mistake("validation shards are not there", remove("shards/validation"), ("shards/validation",)),
    Mistake("a pipe for a shard", lambda p: _pipe(p.shard(".tar")), (".tar",)),
    Mistake(
        "a table where shards should be",
        lambda p: put("data.sources", [{"shards": str(p.folder / "reviews.jsonl")}])(p),
        ("reviews.jsonl",),
    ),
    Mistake("another tokenizer", other_tokenizer, ("tokenizer",)),
    Mistake("no tokenizer there", remove("tokenizer"), ("tokenizer.path",)),
    Mistake("half a tokenizer", half("tokenizer/tokenizer.json"), ("tokenizer",)),
    Mistake("fewer tokens than a row", put("data.seq_len", 10**7), ("seq_len", "position", "row")),
]
PATHS = [
    Mistake("a stranger's files in the run directory", foreign, ("runs/mine",)),
    Mistake("the run directory is a file", file_for_folder, ("runs/mine",)),
    Mistake("a disk that only reads", disk("ro"), ("run.root", "runs")),
    Mistake("a full disk", disk("size=40k"), ("runs",)),
    Mistake("no room for a checkpoint", disk("size=6m"), ("runs",)),
    Mistake("no inodes", disk("nr_inodes=4"), ("runs",)),
    Mistake("runs on a disk of this node", put("run.root", "/dev/shm/runs"), ("run.root",)),
    Mistake("scripts that are not there", put("cluster.scripts", "nowhere"), ("cluster.scripts",)),
]
EXAMPLES = [
    Mistake("no such column", put("data.columns", {"text": "review"}), ("review",), True),
    Mistake("no such table", put("data.train", "reviews.csv"), ("reviews.csv",), True),
    Mistake("an empty table", write("reviews.jsonl", ""), ("reviews.jsonl",), True),
    Mistake("a broken line", lambda p: second_line(p, '{"text": "a'), ("reviews.jsonl",), True),
    Mistake("no label in a line", lambda p: second_line(p, '{"text": "a"}'), ("label",), True),
    Mistake(
        "one label for all",
        reviews(lambda rows: [row.update(label="x") for row in rows]),
        ("label",),
        True,
    ),
    Mistake(
        "an id twice", reviews(lambda rows: [row.update(id="a") for row in rows[:2]]), ("id",), True
    ),
    Mistake("no such task", put("task.name", "classification"), ("task",), True),
    Mistake("all held out", put("data.validation", 1.5), ("data.validation",), True),
    Mistake("no pretrained folder", remove("encoder"), ("encoder",), True),
    Mistake("pretrained weights are gone", lambda p: _weights(p).unlink(), ("encoder",), True),
    Mistake("pretrained weights are cut off", lambda p: _halve(_weights(p)), ("encoder",), True),
    Mistake("half a config.json", half("encoder/config.json"), ("encoder",), True),
    Mistake(
        "a metric that the task has not",
        put("checkpoint.keep_best", {"metric": "validation_rougeL"}),
        ("keep_best",),
        True,
    ),
]
MISTAKES = [*SHARDS, *PATHS, *EXAMPLES]


def _halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _weights(place: Place) -> Path:
    return place.folder / "encoder" / "model.safetensors"
