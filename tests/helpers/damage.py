"""Every kind of damage to a folder of token shards that this project knows of: shared by the tests
and by ``benchmarks/damage.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hfscale.shards.index import ShardIndex
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.writer import BLOCK, ShardWriter

CHUNK_TOKENS, CHUNKS, SHARDS = 256, 4, 3
# the shard that is damaged, in its third chunk of four: two can be read before it and one after it
HURT = 1


def write_shards(folder: Path, *, seed: int = 0) -> Manifest:
    """Return the manifest of a few small shards in ``folder``."""
    entries: list[ShardEntry] = []
    writer = ShardWriter(
        folder,
        name="s",
        dtype=np.dtype("<u2"),
        chunk_tokens=CHUNK_TOKENS,
        shard_chunks=CHUNKS,
        committed=entries.append,
    )
    ids = np.random.default_rng(seed).integers(1, 500, CHUNK_TOKENS * CHUNKS * SHARDS).astype("<u2")
    ids[31::32] = 0  # documents of 32 tokens
    for document in np.split(ids, range(32, len(ids), 32)):
        writer.add(document)
    writer.close()
    manifest = Manifest(
        dtype="uint16",
        tokenizer=TokenizerInfo("t", 500, 0),
        source={},
        shards=tuple(entries),
        folder=folder,
    )
    manifest.save(folder)
    return manifest


def _tar(folder: Path) -> Path:
    return folder / f"s-{HURT:06d}.tar"


def _payload(folder: Path) -> int:
    """Return the offset of the tokens of the third chunk."""
    return int(ShardIndex.load(_tar(folder).with_suffix(".idx")).tokens[2]["offset"])


def _cut(folder: Path, at: int) -> None:
    _tar(folder).write_bytes(_tar(folder).read_bytes()[:at])


def _flip(folder: Path, at: int) -> None:
    data = bytearray(_tar(folder).read_bytes())
    data[at] ^= 1
    _tar(folder).write_bytes(data)


def _of_another_build(folder: Path, name: str) -> None:
    write_shards(folder / "other", seed=1)
    (folder / "other" / name).replace(folder / name)


def _recount(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][HURT]["documents"] += 1
    path.write_text(json.dumps(content))


@dataclass(frozen=True)
class Damage:
    """One kind: how it is done to a folder, what our reader and ``verify`` say of it (regular
    expressions), and which chunks are lost.
    """

    do: Callable[[Path], object]
    reader: str
    verify: str
    lost: tuple[int, ...] = (2,)  # chunks of the hurt shard that cannot be read


ALL = (0, 1, 2, 3)
NAMED = r"000000002\.tokens\.bin at offset [\d,]+"
KINDS = {
    "cut at a member boundary": Damage(
        lambda f: _cut(f, _payload(f) - BLOCK),
        "has [\\d,]+ bytes, its manifest says",
        "has [\\d,]+ bytes",
        (2, 3),
    ),
    "cut inside a header": Damage(
        lambda f: _cut(f, _payload(f) - BLOCK // 2),
        "bytes, its manifest says",
        "has [\\d,]+ bytes",
        (2, 3),
    ),
    "cut inside a payload": Damage(
        lambda f: _cut(f, _payload(f) + 100),
        "bytes, its manifest says",
        "cut short inside member",
        (2, 3),
    ),
    "a header byte flipped": Damage(
        lambda f: _flip(f, _payload(f) - BLOCK + 3),
        f"the header of member {NAMED}.* is damaged",
        "damaged, at offset [\\d,]+",
    ),
    "a payload byte flipped": Damage(
        lambda f: _flip(f, _payload(f) + 5),
        f"member {NAMED}.* does not match its checksum",
        f"member {NAMED} does not match",
    ),
    "a shard missing": Damage(
        lambda f: _tar(f).unlink(),
        "the shard cannot be read: No such file",
        "the shard is missing",
        ALL,
    ),
    "an index missing": Damage(
        lambda f: _tar(f).with_suffix(".idx").unlink(),
        "index of a shard cannot be read: No such file",
        "index of a shard cannot be read",
        ALL,
    ),
    "an index damaged": Damage(
        lambda f: _tar(f).with_suffix(".idx").write_bytes(b"HFSIDX1\n" + bytes(90)),
        "index of a shard is damaged",
        "index of a shard is damaged",
        ALL,
    ),
    "an index of another build": Damage(
        lambda f: _of_another_build(f, f"s-{HURT:06d}.idx"),
        "index belongs to another shard",
        "index belongs to another shard",
        ALL,
    ),
    "a manifest of another build": Damage(
        lambda f: _of_another_build(f, "manifest.json"),
        "index belongs to another shard",
        "SHA-256 is not the one in the manifest",
        ALL,
    ),
    "a manifest that counts wrong": Damage(
        _recount,
        "the index counts [\\d,]+ tokens in [\\d,]+ documents, the manifest",
        "its manifest says",
        ALL,
    ),
}
