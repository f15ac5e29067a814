"""Tables of plug-ins: a literal ``name -> "module:Class"``, imported only when one is used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from hfscale.errors import ConfigError, nearest


def load_plugin(kind: str, table: Mapping[str, str], name: str) -> Any:
    """Return the class that ``table`` gives for ``name``.

    Raises:
        ConfigError: if there is none; the message offers the nearest names.
    """
    if name not in table:
        raise ConfigError(
            f"unknown {kind} {name!r}",
            where=f"{kind}.name",
            value=name,
            remedy=nearest(name, table),
        )
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
