"""Data by a stranger or after an accident: shards, tars and tables."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import xxhash

from benchmarks.fuzz.act import Act, Random, command, read_shards, tokens_of
from benchmarks.fuzz.bend import bend_json, bend_lines, damage, replaced


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
            near = [0, 1, old + 1, max(0, old - 1), 2 * old]
            members[name][number] = rng.choice([*near, 2**32, 2**63, 2**64 - 1, 2**47])
        if way < 0.35:
            members = members[: rng.randrange(len(members) + 1)]
        count = len(members) if rng.random() < 0.8 else rng.randrange(2**40)
        body = body[:40] + count.to_bytes(8, "little") + members.tobytes()
    file.write_bytes(body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little"))
    return read_shards(rng, folder)


def on_shard_bytes(rng: Random, home: Path) -> Act:
    """Accidents to shards, read as training reads them."""
    folder = home / "shards" / "train"
    indexes, tars = sorted(folder.glob("*.idx")), sorted(folder.glob("*.tar"))
    file = rng.choice([folder / "manifest.json", *indexes, *tars, *tars])
    file.write_bytes(damage(rng, file.read_bytes()))
    return lambda: tokens_of(folder)


FIELDS = [(0, 100), (124, 12), (124, 12), (156, 1), (100, 8), (257, 8), (136, 12)]  # begin, size


def on_tar(rng: Random, home: Path) -> Act:
    """A tar by a stranger: its headers, under good checksums."""
    file = home / "raw.tar"
    data = bytearray(file.read_bytes())
    way = rng.random()
    if way < 0.3:
        data = bytearray(damage(rng, bytes(data)))
    else:
        at = rng.randrange(4) * 2048 + rng.choice([0, 1024])
        begin, size = rng.choice(FIELDS)
        data[at + begin : at + begin + size] = hostile_field(rng, size)
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    if rng.random() < 0.2:
        data = bytearray(pax(rng)) + data
    file.write_bytes(data)
    if rng.random() < 0.3:
        return command("predict", "export", "--data", "raw.tar", "generation.max_new_tokens=1")
    return command("shards", "index", "raw.tar", "--out", "indexed")


def hostile_field(rng: Random, size: int) -> bytes:
    """Return ``size`` bytes for a field of a header."""
    values = [
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
    return rng.choice(values)


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
