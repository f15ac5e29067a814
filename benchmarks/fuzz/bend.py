"""Ways to change values and files, each drawn from a generator of random numbers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.fuzz.act import Random

VALUES: list[Any] = [None, True, -1, 0, 1, 7, 2**31, 2**53, 2**63, 2**64, 2**200, 1e308, 0.5]
VALUES += [float("nan"), "", "x", "9", "-1", "../../x", "a/b", "a\0b", "\ud800", "~nosuchuser/x"]
VALUES += ["a" * 300, "é" * 200, "/dev/zero", "{}", "$(id)", "\x1b[2J", "x\ny"]
VALUES += [[], {}, [1], ["x"], {"x": 1}, [[]], [None], {"": {}}]


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
        if not is_there(node, key):
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


def is_there(node: Any, key: Any) -> bool:
    """Return whether a dict or list still has ``key``: an earlier change may have taken it out."""
    return key in node if isinstance(node, dict) else key < len(node)


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
