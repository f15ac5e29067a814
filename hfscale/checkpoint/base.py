"""The base of adapters: weights that a checkpoint stands beside and does not hold. Whoever opens
such a checkpoint looks whether they are still those that the adapters were trained with.

A base is named by the digests of its files: of a checkpoint of ours that of its manifest, which has
those of the rest. Files of gigabytes are read once a machine: a digest is kept as long as the
file's inode, size and times of change stay the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import torch.distributed as torch_dist

from hfscale.checkpoint import layout
from hfscale.checkpoint.state import Adapters
from hfscale.dist.agree import from_rank_0
from hfscale.errors import CheckpointError
from hfscale.shards.files import file_digest, write_atomically


class Identity(TypedDict):
    """What names the weights in a folder."""

    sizes: dict[str, int]  # bytes of each file
    digests: dict[str, str]


def identity(folder: Path) -> Identity:
    """Return what names the weights in ``folder``. Collective, in a group."""
    here = not torch_dist.is_initialized() or torch_dist.get_rank() == 0
    named = from_rank_0(Identity(sizes=sizes(folder), digests=_digests(folder)) if here else None)
    assert named is not None, "rank 0 looked"
    return named


def sizes(folder: Path) -> dict[str, int]:
    """Return the files that name the weights in ``folder``, and how large they are; none, where
    they are gone.
    """
    return {file.name: file.stat().st_size for file in _files(folder)}


def changed(folder: Path) -> str:
    """Return what is other after any change to the weights in ``folder``, without reading them."""
    return json.dumps([[str(file), *_stamp(file)] for file in _files(folder)])


def check_base(saved: Adapters, *, where: Path | str) -> None:
    """Return if the base of the adapters in checkpoint ``where`` is what it was; ``saved`` is what
    that says of it. Collective.

    Raises:
        CheckpointError: on all ranks, if it has changed, or is gone.
    """
    folder = Path(saved.folder)
    here = not torch_dist.is_initialized() or torch_dist.get_rank() == 0
    now = from_rank_0(sizes(folder) if here else {})
    if not now:
        raise CheckpointError(
            "the weights that the adapters stand beside are gone",
            where=folder,
            value=f"the base of {where}",
            remedy="give them back; an export (merged) would need them no more",
        )
    if saved.sizes in (None, now):
        named = identity(folder)
        now = named["sizes"]
        if named["digests"] == saved.digests:
            return
    files = ", ".join(sorted({*saved.digests, *now}))
    raise CheckpointError(
        "the weights that the adapters stand beside have changed",
        where=folder,
        value=f"{files}; the base of {where}",
        remedy="give them back, or begin another run.name",
    )


def _files(folder: Path) -> list[Path]:
    manifest = folder / layout.MANIFEST
    return [manifest] if manifest.is_file() else sorted(folder.glob("*.safetensors"))


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _digests(folder: Path) -> dict[str, str]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hfscale"
    return {file.name: _digest(file, cache / "digests") for file in _files(folder)}


def _digest(file: Path, cache: Path) -> str:
    """Return the SHA-256 of ``file``, as it was kept in ``cache`` if nothing has touched it
    since.
    """
    name = json.dumps([str(file.resolve()), *_stamp(file)])
    kept = cache / hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        if len(known := kept.read_text("ascii")) == 64:
            return known
    digest = file_digest(file)
    if json.dumps([str(file.resolve()), *_stamp(file)]) == name:  # not while it was read
        with suppress(OSError):  # a home that cannot be written costs time alone
            cache.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, digest.encode())
    return digest
