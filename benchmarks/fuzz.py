"""Hostile and damaged input, from a seed: every file that hfscale reads, and what it makes of each.

A small run, its shards, its export and its scores are made once with the commands that a user
types. Each input is a copy with one thing changed, and one command on it, in a fork of this process
with a time limit. It may refuse (exit code 2) or accept; it must not end in a traceback, hang, be
killed, or read damaged tokens or weights otherwise than they were written.

    python -m benchmarks.fuzz                        # 2,000 inputs, into RESULTS.md
    python -m benchmarks.fuzz --inputs 200 --seed 7 --only idx
    python -m benchmarks.fuzz --replay idx:17        # one of them, with its output
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import yaml

from benchmarks.common import machine, record, table
from tests.helpers.cli import hfscale
from tests.helpers.corpus import make_corpus, run_values

LIMIT_S, MEMORY_BYTES = 60.0, 32 << 30  # of one input
TRACEBACK = "Traceback (most recent call last)"
Act = Callable[
    [], object
]  # what is done with an input; a str that it returns is a digest of what was read
Random = random.Random


# ---------------------------------------------------------------------------------- what is damaged
def make_base(home: Path) -> Path:
    """Return a folder with shards, raw tars, tables, a run of four steps, its export and its
    scores.
    """
    base = make_corpus(home / "base")
    add_files(base)
    hfscale("pretrain", "run.yaml", "--procs", 1, cwd=base)
    hfscale("export", "runs/r", "export", cwd=base)
    hfscale("evaluate", "runs/r", cwd=base)
    return base


def add_files(base: Path) -> None:
    """Put a config of a run, tables and a tar of raw text beside a corpus."""
    values = run_values(base, base / "runs", "r")
    values["checkpoint"] = {"every_steps": 2, "keep_last": 2}
    values["train"] = {"steps": 4, "global_batch": 4, "micro_batch": 4}
    values["engine"] = {"precision": "fp32", "zero_stage": 1}
    values["data"]["validation"] = {
        "shards": str(base / "shards" / "validation"),
        "every_steps": 2,
        "rows": 4,
    }
    (base / "run.yaml").write_text(yaml.safe_dump(values))
    rows = [
        {
            "id": str(n),
            "prompt": f"def f{n}",
            "text": f"x = {n}",
            "label": f"l{n % 2}",
            "prediction": f"l{n % 2}",
        }
        for n in range(4)
    ]
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "rows.csv").write_text("id,prompt\n" + "".join(f"{n},def f{n}\n" for n in range(4)))
    with tarfile.open(base / "raw.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for n in range(4):
            for name, data in ((f"{n}.txt", b"text %d" % n), (f"{n}.json", b'{"prompt": "a"}')):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def tokens_of(folder: Path) -> str:
    """Return a digest of all tokens and document ends of the shards in ``folder``, as training
    reads them.
    """
    from hfscale.shards.manifest import Manifest
    from hfscale.shards.reader import ShardReader

    manifest, digest = Manifest.load(folder), hashlib.sha256()
    for entry in manifest.shards:
        reader = ShardReader(folder, entry, dtype=manifest.numpy_dtype)
        ids = np.empty(entry.tokens, np.int64)
        reader.read_tokens(0, entry.tokens, ids)
        digest.update(ids.tobytes())
        digest.update(reader.ends().tobytes())
    return digest.hexdigest()


def weights_of(checkpoint: Path) -> str:
    """Return a digest of all weights of a checkpoint, as a job reads them."""
    from hfscale.checkpoint.weights import open_weights

    reader, digest = open_weights(checkpoint), hashlib.sha256()
    for name in sorted(reader.names()):
        digest.update(f"{name} {reader.shape(name)}".encode())
        digest.update(reader.read(name).float().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------- ways to change
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**31, 2**53, 2**63, 2**64, 2**200, 1e308, 0.5, float("nan")),
    *(
        "",
        "x",
        "9",
        "-1",
        "../../x",
        "a/b",
        "a\0b",
        "\ud800",
        "~nosuchuser/x",
        "a" * 300,
        "é" * 200,
    ),
    *("/dev/zero", "{}", "$(id)", "\x1b[2J", "x\ny"),
    *([], {}, [1], ["x"], {"x": 1}, [[]], [None], {"": {}}),
]


def deep(levels: int) -> Any:
    """Return lists in lists."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def bent(rng: Random, value: Any) -> Any:
    """Return ``value``, a JSON tree, with something in it exchanged, taken out or put in."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in [*items][:200]:
            places.append((node, key))
            if isinstance(inner, dict | list):
                walk(inner)

    if not isinstance(value, dict | list) or rng.random() < 0.03:
        return rng.choice(VALUES)
    walk(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not places:
            break
        node, key = rng.choice(places)
        way = rng.random()
        if (isinstance(node, dict) and key not in node) or (
            isinstance(node, list) and key >= len(node)
        ):
            continue
        if way < 0.12:
            del node[key]
        elif way < 0.2 and isinstance(node, dict):
            node[rng.choice(["x", "", "a\0b", "é", key + "x"])] = rng.choice(VALUES)
        elif way < 0.25:
            node[key] = deep(rng.choice([60, 150, 190]))
        elif way < 0.45 and isinstance(node[key], int):
            node[key] += rng.choice([1, -1, 10**9, -(10**9)])
        else:
            node[key] = rng.choice(VALUES)
    return value


def damage(rng: Random, data: bytes) -> bytes:
    """Return ``data`` after an accident: bits flipped, cut, a hole of zeros, bytes lost or
    doubled.
    """
    at = rng.randrange(len(data) + 1)
    size = rng.choice([1, 2, 7, 64, 512, 4096])
    way = rng.randrange(6)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]
    if way == 2:
        return data[:at] + data[at + size :]
    if way == 3:
        return data[:at] + rng.randbytes(size) + data[at:]
    if way == 4:
        return data[:at] + data[at : at + size] + data[at:]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


WHOLE = [b"", b"null", b"[]", b"{}", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5_000]
WHOLE += [b"\0" * 4096, b"NaN", b'"x"', b"9" * 10_000, b"[" * 150 + b"]" * 150]


def replaced(rng: Random, file: Path) -> None:
    """Put something else where ``file`` is: other bytes, a pipe, a device, a folder, nothing, a
    link to itself.
    """
    file.unlink()
    way = rng.randrange(12)
    if way == 0:
        os.mkfifo(file)
    elif way == 1:
        file.symlink_to("/dev/zero")
    elif way == 2:
        file.mkdir()
    elif way == 3:
        file.symlink_to(file.name)
    elif way != 4:
        file.write_bytes(rng.choice(WHOLE))


def bend_json(rng: Random, file: Path) -> None:
    """Change a file of JSON, or replace it."""
    if rng.random() < 0.2:
        replaced(rng, file)
        return
    changed = json.dumps(bent(rng, json.loads(file.read_text())))
    if rng.random() < 0.1:
        changed = damage(rng, changed.encode()).decode("utf-8", "ignore")
    file.unlink()
    file.write_text(changed, "utf-8", "surrogatepass")


def bend_lines(rng: Random, file: Path) -> None:
    """Change one line of a file of JSON lines."""
    lines = file.read_text().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = json.dumps(bent(rng, json.loads(lines[number])))
    if rng.random() < 0.2:
        lines[number] = rng.choice(WHOLE[:8]).decode("latin-1")
    file.write_text("\n".join(lines) + "\n", "utf-8", "surrogatepass")


def sealed(checkpoint: Path) -> None:
    """Make the manifest of a checkpoint again, as whoever changed its files on purpose would."""
    from hfscale.checkpoint import manifest

    entries = []
    for file in sorted(path for path in checkpoint.rglob("*") if path.name != "manifest.json"):
        if file.is_file():
            data = file.read_bytes()
            name = file.relative_to(checkpoint).as_posix()
            entries.append(manifest.Entry(name, len(data), hashlib.sha256(data).hexdigest()))
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    step = int(checkpoint.name.removeprefix("step-"))
    manifest.write_manifest(checkpoint, entries, step=step)


# ----------------------------------------------------------------------------------------- surfaces
def command(*words: object) -> Act:
    """Return what runs a command line in this process."""

    def act() -> None:
        from launch.cli import main

        sys.argv = ["hfscale", *map(str, words)]
        main()

    return act


def on_yaml(rng: Random, home: Path) -> Act:
    """A config by hand: bent values, and text that is hard on a parser."""
    name = rng.choice(["run.yaml", "corpus.yaml"])
    file, way = home / name, rng.random()
    text = file.read_text()
    if way < 0.7:
        values = bent(rng, yaml.safe_load(text))
        text = json.dumps(values) if rng.random() < 0.5 else yaml.safe_dump(values)
    elif way < 0.8:
        text = damage(rng, text.encode()).decode("utf-8", "replace")
    else:
        text = rng.choice(
            [
                "a: &a [x,x,x,x,x,x,x,x,x]\n"
                + "".join(
                    f"{c}: &{c} [{', '.join('*' + p for _ in range(9))}]\n"
                    for p, c in zip("abcdefghi", "bcdefghij")
                ),
                "a: &a {b: *a}\n",
                "[" * 5000,
                "{a: " * 3000,
                "- " * 20_000 + "x",
                "x: " + "[1, " * 40 + "]" * 40,
                "\n".join(f"k{n}: {{a: {n}}}" for n in range(60_000)),
                "x: 1\n" * 800_000,
                "extends: [run2.yaml]",
                "extends: ~nosuchuser/x",
                f"extends: {'a' * 300}",
                "!!python/object/apply:os.system [id]",
                "? [a, b]\n: c",
                "%YAML 9.9\n---\na: 1",
                "a: \x00",
                "run: {name: 'a\\0b'}",
                'run: {name: "\\ud800"}',
            ]
        )
    file.unlink()
    file.write_text(text, "utf-8", "surrogatepass")
    if rng.random() < 0.06:
        replaced(rng, file)
    if name == "corpus.yaml":
        return command("shards", "build", name, "shards.path=new", "shards.procs=1")
    return command(*rng.choice([("show", name), ("pretrain", name, "--dry-run", "--procs", "1")]))


def on_overrides(rng: Random, home: Path) -> Act:
    """Values on the command line."""
    keys = ["run.name", "run.root", "train.epochs", "train.steps", "data.sources", "tokenizer.path"]
    keys += ["model.config.n_layer", "model.config", "model.pretrained", "optim.lr", "data.seq_len"]
    keys += ["optim.betas", "schedule.warmup_steps", "model.freeze", "data.sources.0.shards", "x.y"]
    texts = [
        "1e308",
        "true",
        "-1",
        "0",
        "[",
        "{",
        "{a: &a [*a]}",
        "~nosuchuser/x",
        "a" * 300,
        "1e-400",
    ]
    texts += [
        "9" * 5000,
        "[" * 300,
        "null",
        "x",
        "1000000000",
        "é" * 200,
        "[(]",
        "\udcff",
        "http://x/ y",
    ]
    words = [f"{rng.choice(keys)}={rng.choice(texts)}" for _ in range(rng.choice([1, 1, 2]))]
    verb = rng.choice([("show",), ("pretrain", "--dry-run", "--procs", "1")])
    return command(verb[0], "run.yaml", *words, *verb[1:])


def on_names(rng: Random, home: Path) -> Act:
    """Names of runs, models, tables and folders that are none."""
    names = [
        "~nosuchuser/x",
        "a" * 300,
        "x/" * 3000,
        "\udcff",
        "runs/r@x",
        "runs/r@99",
        "",
        ".",
        "/",
    ]
    names += [
        "/dev/zero",
        "/dev/null",
        "rows.jsonl",
        "rows.jsonl/x",
        "export/config.json",
        "runs",
        "-",
        "é" * 150,
    ]
    name = rng.choice(names)
    return command(
        *rng.choice(
            [
                ("status", name),
                ("logs", name),
                ("show", name),
                ("checkpoints", name),
                ("export", name, "out"),
                ("export", "runs/r", name),
                ("predict", name, "--prompt", "a"),
                ("predict", "export", "--data", name),
                (
                    "predict",
                    "export",
                    "--data",
                    "rows.jsonl",
                    "data.columns.prompt=prompt",
                    "--out",
                    name,
                ),
                ("evaluate", name, "--data", "shards/validation"),
                ("compare", name),
                ("batch", name, "--step", "2"),
                ("shards", "stats", name),
                ("shards", "cat", name),
                ("shards", "index", name),
                ("tokenizer", "add", name, "out", "mask=<m>"),
                ("pretrain", name, "--dry-run", "--procs", "1"),
                ("finetune", name, "--dry-run", "--procs", "1"),
            ]
        )
    )


READERS = [
    ("verify",),
    ("stats",),
    ("cat",),
    ("cat", "--document", "5"),
    ("cat", "--row", "3", "--seq-len", "8"),
]


def read_shards(rng: Random, folder: Path) -> Act:
    """Return a command that reads shards, or training's own reader."""
    if rng.random() < 0.4:
        return lambda: (tokens_of(folder), None)[1]
    verb, *more = rng.choice(READERS)
    return command("shards", verb, folder, *more)


def on_manifest(rng: Random, home: Path) -> Act:
    """A manifest of shards that lies."""
    folder = home / "shards" / "train"
    bend_json(rng, folder / "manifest.json")
    return read_shards(rng, folder)


def on_index(rng: Random, home: Path) -> Act:
    """An index that lies under a good checksum."""
    from hfscale.shards.index import MEMBER

    folder = home / "shards" / "train"
    file = rng.choice(sorted(folder.glob("*.idx")))
    body = file.read_bytes()[:-8]
    way = rng.random()
    if way < 0.2:
        body = b"HFSIDX1\n" + damage(rng, body)[8:]
    else:
        members = np.frombuffer(body, MEMBER, offset=48).copy()
        for _ in range(rng.choice([1, 1, 3])):
            name = rng.choice(["offset", "bytes", "tokens", "documents"])
            number = rng.randrange(len(members))
            old = int(members[name][number])
            new = rng.choice(
                [0, 1, old + 1, max(0, old - 1), 2 * old, 2**32, 2**63, 2**64 - 1, 2**47]
            )
            members[name][number] = new
        if way < 0.35:
            members = members[: rng.randrange(len(members) + 1)]
        count = len(members) if rng.random() < 0.8 else rng.randrange(2**40)
        body = body[:40] + count.to_bytes(8, "little") + members.tobytes()
    file.write_bytes(body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"))
    return read_shards(rng, folder)


def on_shard_bytes(rng: Random, home: Path) -> Act:
    """Accidents to shards, read as training reads them."""
    folder = home / "shards" / "train"
    files = [
        folder / "manifest.json",
        *sorted(folder.glob("*.idx")),
        *sorted(folder.glob("*.tar")) * 2,
    ]
    file = rng.choice(files)
    file.write_bytes(damage(rng, file.read_bytes()))
    return lambda: tokens_of(folder)


RUN = (
    "status",
    "checkpoints",
    "checkpoints --verify",
    "show",
    "compare",
    "export",
    "predict",
    "batch",
)


def read_run(rng: Random) -> Act:
    """Return a command that looks at a run."""
    verb = rng.choice(RUN)
    more = {"export": ["out"], "predict": ["--prompt", "def"], "batch": ["--step", "2"]}.get(
        verb, []
    )
    first, *flags = verb.split()
    return command(first, "runs/r", *flags, *more)


def on_state(rng: Random, home: Path) -> Act:
    """What checkpoints say, changed on purpose: their manifests are made again."""
    checkpoints = sorted((home / "runs" / "r" / "checkpoints").glob("step-*"))
    names = ["state.json", "state.json", "config.json", "generation_config.json", "manifest.json"]
    name = rng.choice(names)
    for checkpoint in checkpoints[-rng.choice([1, 2]) :]:
        bend_json(rng, checkpoint / name)
        if name != "manifest.json":
            sealed(checkpoint)
        elif rng.random() < 0.7 and (checkpoint / name).is_file():
            reseal(checkpoint / name)
    return read_run(rng)


def reseal(file: Path) -> None:
    """Give a changed manifest of a checkpoint the digest that it should have, if it still is
    one.
    """
    try:
        body = json.loads(file.read_text())
        body.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps({**body, "sha256": digest}))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return


def on_fragments(rng: Random, home: Path) -> Act:
    """Headers of safetensors in checkpoints, changed on purpose."""
    checkpoint = sorted((home / "runs" / "r" / "checkpoints").glob("step-*"))[-1]
    [file] = (checkpoint / "engine").glob("*.safetensors")
    bend_header(rng, file)
    sealed(checkpoint)
    return read_run(rng)


def bend_header(rng: Random, file: Path) -> None:
    """Change the header of a safetensors file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.3 and "shapes" in header.get("__metadata__", {}):
        inner = bent(rng, json.loads(header["__metadata__"]["shapes"]))
        header["__metadata__"]["shapes"] = json.dumps(inner)
    else:
        header = bent(rng, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = len(text) if rng.random() < 0.9 else rng.choice([0, 2**40, 2**63, len(text) + 5])
    file.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])


def on_checkpoint_bytes(rng: Random, home: Path) -> Act:
    """Accidents to a checkpoint, read as a job reads it."""
    checkpoint = sorted((home / "runs" / "r" / "checkpoints").glob("step-*"))[-1]
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    file = rng.choice(files)
    file.write_bytes(damage(rng, file.read_bytes()))
    return lambda: weights_of(checkpoint)


def on_export(rng: Random, home: Path) -> Act:
    """A model's folder by a stranger."""
    folder = home / "export"
    names = [
        "config.json",
        "config.json",
        "tokenizer.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    names += ["generation_config.json", "model.safetensors"]
    file = folder / rng.choice(names)
    if file.name == "config.json" and rng.random() < 0.2:
        config = json.loads(file.read_text())
        sizes = ["n_layer", "n_head", "vocab_size", "n_positions", "num_labels", "n_embd"]
        config[rng.choice(sizes)] = 10**9
        file.write_text(json.dumps(config))
    elif file.suffix == ".json":
        bend_json(rng, file)
    elif rng.random() < 0.2:
        replaced(rng, file)
    else:
        bend_header(rng, file)
    return command(
        *rng.choice(
            [
                ("predict", "export", "--prompt", "def", "generation.max_new_tokens=2"),
                ("predict", "export", "--prompt", "def", "generation.max_new_tokens=2"),
                ("evaluate", "export", "--data", "shards/validation", "evaluate.rows=4"),
                (
                    "pretrain",
                    "run.yaml",
                    "--dry-run",
                    "--procs",
                    "1",
                    "model.pretrained=export",
                    "model.architecture=null",
                ),
                ("pretrain", "run.yaml", "--dry-run", "--procs", "1", "tokenizer.path=export"),
                ("tokenizer", "add", "export", "out", "mask=<m>"),
            ]
        )
    )


def on_records(rng: Random, home: Path) -> Act:
    """What a run has written of itself: metrics, environment, scores, its config."""
    run = home / "runs" / "r"
    which = rng.choice(
        ["metrics.jsonl", "environment.json", "attempts/1/ended", "scores", "config.yaml"]
    )
    if which == "metrics.jsonl":
        bend_lines(rng, run / which)
        if rng.random() < 0.1:
            replaced(rng, run / which)
        return command(
            *rng.choice(
                [("status", "runs/r"), ("compare", "runs/r"), ("batch", "runs/r", "--step", "2")]
            )
        )
    if which == "scores":
        [file] = run.glob("evaluations/*/*/scores.json")
        bend_json(rng, file)
        return command(
            *rng.choice([("compare", "runs/r"), ("evaluate", "runs/r"), ("compare", file)])
        )
    if which == "config.yaml":
        values = bent(rng, yaml.safe_load((run / which).read_text()))
        (run / which).write_text(json.dumps(values), "utf-8", "surrogatepass")
        return read_run(rng)
    bend_json(rng, run / which)
    return command(
        *rng.choice(
            [
                ("status", "runs/r"),
                ("pretrain", "runs/r", "--dry-run", "--procs", "1"),
                ("show", "runs/r"),
            ]
        )
    )


def on_tar(rng: Random, home: Path) -> Act:
    """A tar by a stranger: its headers, under good checksums."""
    file = home / "raw.tar"
    data = bytearray(file.read_bytes())
    way = rng.random()
    if way < 0.3:
        data = bytearray(damage(rng, bytes(data)))
    else:
        at = rng.randrange(4) * 2048 + rng.choice([0, 1024])
        begin, size = rng.choice(
            [(0, 100), (124, 12), (124, 12), (156, 1), (100, 8), (257, 8), (136, 12)]
        )
        value = rng.choice(
            [
                rng.randbytes(size),
                b"\xff" * size,
                b"\x80" + bytes(size - 2) + b"\x05" if size > 2 else b"x",
                b"0" * size,
                b"7" * (size - 1) + b"\0",
                b"g" * size,
                b"x" * size,
                b"L" * size,
                b"S" * size,
                b" " * size,
                bytes(size),
                b"../../etc/passwd".ljust(size, b"\0")[:size],
                b"\xff\xfe.txt".ljust(size, b"\0")[:size],
                b"__x__.txt".ljust(size, b"\0")[:size],
            ]
        )
        data[at + begin : at + begin + size] = value
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    if rng.random() < 0.2:
        data = bytearray(pax(rng)) + data
    file.write_bytes(data)
    if rng.random() < 0.3:
        return command("predict", "export", "--data", "raw.tar", "generation.max_new_tokens=1")
    return command("shards", "index", "raw.tar", "--out", "indexed")


def pax(rng: Random) -> bytes:
    """Return extended headers that no writer makes."""
    keys = [b"size=-2048", b"size=x", b"size=9" + b"9" * 30, b"path=" + b"a" * 70_000, b"mtime=nan"]
    keys += [b"GNU.sparse.map=0", b"GNU.sparse.major=1", b"path=\xff\xfe", b"hdrcharset=BINARY"]
    made = b""
    for _ in range(rng.choice([1, 1, 2000])):
        line = b" " + rng.choice(keys) + b"\n"
        length = len(line) + len(str(len(line) + 3))
        body = str(length).encode() + line
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(body)
        made += info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)
    return made


def on_table(rng: Random, home: Path) -> Act:
    """Tables by a stranger, as data and as predictions to score."""
    name = rng.choice(["rows.jsonl", "rows.jsonl", "rows.csv"])
    file = home / name
    if name == "rows.csv":
        file.write_bytes(damage(rng, file.read_bytes()))
    else:
        bend_lines(rng, file)
    if rng.random() < 0.1:
        replaced(rng, file)
    if rng.random() < 0.3:
        return command(
            "evaluate", "--task", "sequence_classification", "--data", name, "--predictions", name
        )
    return command("predict", "export", "--data", name, "generation.max_new_tokens=1")


def on_environment(rng: Random, home: Path) -> Act:
    """Variables of torchrun and Slurm that are no numbers."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"]
    names += [
        "SLURM_JOB_ID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_JOB_NUM_NODES",
    ]
    names += [
        "SLURM_NTASKS_PER_NODE",
        "SLURM_GPUS_ON_NODE",
        "SLURM_RESTART_COUNT",
        "SLURM_GPUS_PER_NODE",
    ]
    values = [
        "",
        "x",
        "-1",
        "1.5",
        "9" * 30,
        "0",
        "1",
        "2",
        "4(x2)",
        "gpu:a100:4",
        "١",
        " 3",
        "\udcff",
    ]
    changed = {rng.choice(names): rng.choice(values) for _ in range(rng.choice([1, 2, 4]))}
    changed.setdefault("SLURM_JOB_ID", "7") if rng.random() < 0.6 else None

    def act() -> None:
        from hfscale.dist.world import World, allocation
        from hfscale.errors import exit_code

        os.environ.update(changed)
        try:
            World.from_environment()
            allocation()
        except Exception as error:
            if (code := exit_code(error)) is None:
                raise
            sys.exit(code)

    if rng.random() < 0.3:
        os_environ = dict(changed)

        def shown() -> None:
            os.environ.update(os_environ)
            command("pretrain", "run.yaml", "--dry-run", "--procs", "1")()

        return shown
    return act


@dataclass(frozen=True)
class Surface:
    """Where foreign bytes come in; ``reads`` gives the digest of what undamaged ones say."""

    bend: Callable[[Random, Path], Act]
    needs: tuple[str, ...]  # what of the base is copied
    share: int = 1
    reads: Callable[[Path], str] | None = None


DATA = ("run.yaml", "corpus.yaml", "tokenizer", "shards")
SURFACES = {
    "configs": Surface(on_yaml, (*DATA, "text"), 4),
    "overrides": Surface(on_overrides, DATA, 3),
    "names": Surface(on_names, (*DATA, "runs", "export", "rows.jsonl"), 3),
    "manifests of shards": Surface(on_manifest, DATA, 3),
    "indexes": Surface(on_index, DATA, 3),
    "bytes of shards": Surface(
        on_shard_bytes, DATA, 5, lambda home: tokens_of(home / "shards/train")
    ),
    "checkpoints": Surface(on_state, (*DATA, "runs"), 4),
    "safetensors": Surface(on_fragments, (*DATA, "runs"), 2),
    "bytes of checkpoints": Surface(
        on_checkpoint_bytes,
        (*DATA, "runs"),
        5,
        lambda home: weights_of(sorted((home / "runs/r/checkpoints").glob("step-*"))[-1]),
    ),
    "models": Surface(on_export, (*DATA, "export"), 4),
    "records": Surface(on_records, (*DATA, "runs"), 3),
    "tars": Surface(on_tar, ("raw.tar", "export"), 3),
    "tables": Surface(on_table, ("rows.jsonl", "rows.csv", "export"), 3),
    "environment": Surface(on_environment, DATA, 2),
}


# ---------------------------------------------------------------------------------------- one input
@dataclass
class Outcome:
    """What became of an input."""

    kind: str  # refused, accepted, traceback, hang, killed, silent
    code: int
    output: str
    seconds: float = 0.0


def attempt(surface: Surface, rng: Random, base: Path, scratch: Path, truth: str | None) -> Outcome:
    """Return what becomes of one input of ``surface``, in a fork of this process."""
    home = scratch / "case"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    for name in surface.needs:
        source = base / name
        copy: Any = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, home / name)
    relocate(home, base)
    act, began = surface.bend(rng, home), time.monotonic()
    out = scratch / "output"
    pid = os.fork()
    if pid == 0:
        _child(act, home, out, scratch / "said")
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > LIMIT_S:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Outcome("hang", -1, out.read_text(errors="replace"), LIMIT_S)
        time.sleep(0.005)
    code, output = os.waitstatus_to_exitcode(ended[1]), out.read_text(errors="replace")
    said = (scratch / "said").read_text() if (scratch / "said").is_file() else ""
    (scratch / "said").unlink(missing_ok=True)
    kind = "accepted" if code == 0 else "refused" if code == 2 else "other"
    if code < 0:
        kind = "killed"
    elif TRACEBACK in output or code not in (0, 1, 2, 75, 76):
        kind = "traceback"
    elif code == 0 and truth is not None and said not in ("", truth):
        kind = "silent"
    return Outcome(kind, code, output, time.monotonic() - began)


def relocate(home: Path, base: Path) -> None:
    """Let configs in ``home`` speak of it and not of the base they were copied from."""
    for file in [*home.glob("*.yaml"), *home.glob("runs/*/config.yaml")]:
        file.write_text(file.read_text().replace(str(base), str(home)))


def _child(act: Act, home: Path, out: Path, said: Path) -> None:
    """Do it, and end the process."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(home)
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        from hfscale.errors import exit_code

        try:
            digest = act()
            if isinstance(digest, str):
                said.write_text(digest)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException as error:
            known = exit_code(error)
            if known is None:
                traceback.print_exc()
            code = 1 if known is None else known
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# --------------------------------------------------------------------------------------------- many
@dataclass
class Tally:
    """What became of the inputs of a surface."""

    kinds: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


BAD = ("traceback", "hang", "killed", "silent")


def run(
    inputs: int, *, seed: int, home: Path, only: Sequence[str] = (), base: Path | None = None
) -> dict[str, Tally]:
    """Return what became of ``inputs`` inputs, spread over the surfaces; the bad ones are
    printed.
    """
    base = base or make_base(home)
    warm_up()
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    chosen = {name: surface for name, surface in SURFACES.items() if not only or name in only}
    total, tallies = sum(surface.share for surface in chosen.values()), dict[str, Tally]()
    for name, surface in chosen.items():
        truth = surface.reads(base) if surface.reads else None
        tally = tallies[name] = Tally()
        for number in range(max(1, round(inputs * surface.share / total))):
            rng = Random(f"{seed}/{name}/{number}")
            outcome = attempt(surface, rng, base, home / "scratch", truth)
            tally.kinds[outcome.kind] += 1
            tally.slowest_s = max(tally.slowest_s, outcome.seconds)
            if outcome.kind in BAD:
                last = outcome.output.strip().splitlines()[-1:] or [""]
                tally.bad.append(
                    f"{name}:{number} {outcome.kind} ({outcome.code}): {last[0][:200]}"
                )
                print(tally.bad[-1], flush=True)
        print(f"{name}: {dict(tally.kinds)}, slowest {tally.slowest_s:.1f} s", flush=True)
    return tallies


def spread(
    inputs: int, *, seed: int, home: Path, only: Sequence[str], jobs: int
) -> dict[str, Tally]:
    """Return as ``run``, with each surface in a process of its own, ``jobs`` at once; the base lies
    in ``home``.
    """
    chosen = [name for name in SURFACES if not only or name in only]
    total = sum(SURFACES[name].share for name in chosen)

    def one(name: str) -> Tally:
        own = home / name.replace(" ", "-")
        own.mkdir(exist_ok=True)
        if not (own / "base").exists():
            (own / "base").symlink_to(home / "base")
        count = max(1, round(inputs * SURFACES[name].share / total))
        words = ["--inputs", str(count), "--seed", str(seed), "--home", str(own), "--only", name]
        command = [sys.executable, "-m", "benchmarks.fuzz", *words, "--tally", str(own / "tally")]
        subprocess.run(command, check=True)
        said = json.loads((own / "tally").read_text())
        return Tally(Counter(said["kinds"]), said["bad"], said["slowest_s"])

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(chosen, pool.map(one, chosen), strict=True))


def warm_up() -> None:
    """Import what the commands need, once, before anything is forked."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here asks the hub
    for name in WARM:
        import_module(name)


WARM = ["transformers", "launch.cli", "launch.local", "launch.commands.evaluate"]
WARM += [f"hfscale.jobs.{name}" for name in ("asked", "evaluate", "export", "predict", "shards")]
WARM += [f"hfscale.reports.{name}" for name in ("batch", "cat", "checkpoints", "compare")]
WARM += ["hfscale.tasks.text_generation", "hfscale.objectives.clm", "hfscale.shards.verify"]


def main() -> None:
    """Fuzz and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], choices=[*SURFACES])
    parser.add_argument("--replay", help="SURFACE:NUMBER")
    parser.add_argument("--home", type=Path, help="keep the base here, or use the one that is here")
    parser.add_argument("--jobs", type=int, default=2, help="surfaces at once")
    parser.add_argument("--tally", type=Path, help="of one surface: write what was counted here")
    parser.add_argument("--dry", action="store_true", help="print, do not write RESULTS.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = asked.home or Path(scratch)
        base = home / "base"
        if not (base / "export").is_dir():
            make_base(home)
        base = base.resolve()  # what its configs call it
        if asked.replay:
            name, _, number = asked.replay.rpartition(":")
            warm_up()
            rng = Random(f"{asked.seed}/{name}/{number}")
            outcome = attempt(SURFACES[name], rng, base, home / "scratch", None)
            print(outcome.output, f"\n{outcome.kind} {outcome.code} {outcome.seconds:.1f} s")
            return
        if asked.tally:
            [tally] = run(
                asked.inputs, seed=asked.seed, home=home, only=asked.only, base=base
            ).values()
            asked.tally.write_text(json.dumps(vars(tally)))
            return
        tallies = spread(asked.inputs, seed=asked.seed, home=home, only=asked.only, jobs=asked.jobs)
    kinds = ["refused", "accepted", "other", *BAD]
    rows = [
        [
            name,
            sum(tally.kinds.values()),
            *(tally.kinds[kind] for kind in kinds),
            f"{tally.slowest_s:.1f}",
        ]
        for name, tally in tallies.items()
    ]
    sums = [sum(int(row[place]) for row in rows) for place in range(1, len(kinds) + 2)]
    rows.append(["**all**", *sums, ""])
    header = ["input", "tried", *kinds, "slowest, s"]
    body = (
        f"{machine('pydantic', 'tokenizers', 'transformers')} Seed {asked.seed}. "
        f"{__doc__.split(chr(10) * 2)[1]}\n\n"
    )
    print(table(header, rows))
    if not asked.dry:
        record("fuzz", body + table(header, rows))


if __name__ == "__main__":
    main()
