"""Numbers of classes that have names: ``datasets`` writes those of a ClassLabel into a table's
metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from hfscale.records import Damaged, Record, parse

if TYPE_CHECKING:
    import pyarrow


class _Info(Record):
    features: dict[str, object]


class _Metadata(Record):
    """What ``datasets`` says of a table."""

    info: _Info


def class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Return the names of the classes that the numbers in some columns are of, as ``datasets``
    writes them into a table's metadata.
    """
    features: dict[str, object] = {}
    with suppress(KeyError, TypeError, Damaged):  # no metadata, or of another shape
        features = parse(_Metadata, (schema.metadata or {})[b"huggingface"]).info.features
    names_of = {name: _names_of(feature) for name, feature in features.items()}
    return {name: names for name, names in names_of.items() if names}


def _names_of(feature: object) -> list[str] | None:
    """Return the names of a ClassLabel, or of a list of them."""
    if isinstance(feature, list) and len(feature) == 1:  # an older way to write a list
        feature = {"feature": feature[0]}
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        known = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return names if known else None
    return _names_of(feature["feature"]) if "feature" in feature else None


def with_names(row: dict[str, object], named: Mapping[str, list[str]]) -> dict[str, object]:
    """Return ``row`` with the names of classes for their numbers; -1 is ``datasets``' sign for
    none.
    """
    for column, names in named.items():
        if column in row:
            row[column] = _name(row[column], names)
    return row


def _name(value: object, names: list[str]) -> object:
    if isinstance(value, list):
        return [_name(part, names) for part in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if value == -1:
        return None
    return names[value] if 0 <= value < len(names) else value
