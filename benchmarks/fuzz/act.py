"""What is done with an input: command lines, and the readers of training and of jobs."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

Random = random.Random
Act = Callable[[], object]  # a str that it returns is a digest of what was read


def command(*words: object) -> Act:
    """Return what runs a command line in this process."""

    def act() -> None:
        from launch.cli import main

        sys.argv = ["hfscale", *map(str, words)]
        main()

    return act


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


READERS = [
    ("verify",),
    ("stats",),
    ("cat",),
    ("cat", "--document", "5"),
    ("cat", "--row", "3", "--seq-len", "8"),
]


def read_shards(rng: Random, folder: Path) -> Act:
    """Return a command that reads shards, or training's own reader."""

    def read_all() -> None:  # whose digest may differ: what is bent on purpose reads otherwise
        tokens_of(folder)

    if rng.random() < 0.4:
        return read_all
    verb, *more = rng.choice(READERS)
    return command("shards", verb, folder, *more)


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
ITS_WORDS = {"export": ["out"], "predict": ["--prompt", "def"], "batch": ["--step", "2"]}


def read_run(rng: Random) -> Act:
    """Return a command that looks at a run."""
    verb = rng.choice(RUN)
    first, *flags = verb.split()
    return command(first, "runs/r", *flags, *ITS_WORDS.get(verb, []))
