"""The manifest at a place: here, or at a URL or behind a command, whose shards are fetched as they
are asked for. Nobody else chooses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfscale.shards.manifest import Manifest
from hfscale.shards.remote import PIPE, Remote


def is_remote(place: str | Path) -> bool:
    """Return whether the shards of ``place`` are fetched."""
    return "://" in str(place) or str(place).startswith(PIPE)


def open_manifest(place: str | Path, **remote: Any) -> Manifest:
    """Return the manifest at ``place``: a file, a folder, or the URL of either; ``remote`` is for
    ``Remote``.

    Raises:
        ConfigError: for a URL that cannot be opened, a command that has no permission, a cache
            that is too small.
        DataError: if there is no manifest, or it is damaged.
    """
    return Remote(str(place), **remote).manifest() if is_remote(place) else Manifest.load(place)
