"""Examples {role: value, "id"} out of the rows of tables, by what a task says of its roles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar, Protocol

from hfscale.errors import ConfigError, DataError, nearest
from hfscale.shards.tables import table_rows

MISSING = object()  # None is a cell that is empty


class Roles(Protocol):
    """What a task says of its examples, on its class."""

    columns: ClassVar[dict[str, str]]
    optional: ClassVar[frozenset[str]]
    answers: ClassVar[frozenset[str]]


def read_examples(
    table: str,
    roles: Roles | type[Roles],
    *,
    columns: Mapping[str, str],
    answers: bool = True,
    subset: str | None = None,
    split: str = "train",
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (place, example) of each row. ``columns`` maps roles to columns; without ``answers``
    they may be missing.

    Raises:
        DataError: for a role or column that is not there, an id that occurs twice, a row that
            cannot be read.
    """
    known = {*roles.columns, "id"}
    if wrong := sorted(columns.keys() - known):
        raise ConfigError(
            "the task has no such role",
            where=f"data.columns.{wrong[0]}",
            value=wrong[0],
            remedy=nearest(wrong[0], known),
        )
    seen = set[str]()
    may_lack = roles.optional | (frozenset() if answers else roles.answers) | {"id"}
    asked = [role for role in roles.columns if role not in roles.answers]
    if table.endswith(".txt") and "text" not in roles.columns:
        # a text a line is what is asked about, whatever its role's name
        columns = {asked[0]: "text", **columns}
    for number, (where, row) in enumerate(table_rows(table, subset=subset, split=split)):
        example = _example(row, roles, columns, may_lack=may_lack, where=where)
        if not any(role in example for role in asked):  # each of them alone may be missing
            raise DataError(
                f"there is none of the columns {', '.join(asked)}",
                where=where,
                value=_named(row)[:80],
                remedy=f"say which column is one of them: data.columns.{asked[0]}=COLUMN; the "
                f"columns are {_named(row)}",
            )
        name = str(number) if example.get("id") is None else str(example["id"])
        example["id"] = name
        _refuse_half_characters(example, where=where)
        if name in seen:
            raise DataError(
                "an id occurs twice",
                where=where,
                value=name,
                remedy="give each example an id of its own, or no ids",
            )
        seen.add(name)
        yield where, example
    if not seen:
        raise DataError(
            "there are no rows in it",
            where=table,
            remedy="give at least one; is it the right file, with a header if csv?",
        )


def _refuse_half_characters(example: Mapping[str, object], *, where: str) -> None:
    if not is_text(json.dumps(example, ensure_ascii=False, default=str)):
        raise DataError(
            "a text holds half of a character (a lone surrogate)",
            where=where,
            value=ascii(example)[:80],
            remedy="mend it",
        )


def _example(
    row: Mapping[str, object],
    roles: Roles | type[Roles],
    columns: Mapping[str, str],
    *,
    may_lack: Collection[str],
    where: str,
) -> dict[str, object]:
    """Return the cells of ``row`` by role, those that are there."""
    example = {}
    for role in (*roles.columns, "id"):
        column = columns.get(role, role)
        cell = _cell(row, column)
        if cell is not MISSING:
            example[role] = cell
        elif role not in may_lack or (role in columns and role not in roles.answers):
            raise DataError(
                f"there is no column {column!r} ({role}: {roles.columns.get(role, 'the ids')})",
                where=where,
                value=column,
                remedy=f"say which column it is: data.columns.{role}=COLUMN; the columns are "
                f"{_named(row)}",
            )
    return example


def _cell(row: Mapping[str, object], column: str) -> object:
    """Return a cell of ``row``, or MISSING; a dot goes into an object: ``translation.en`` of
    ``{"translation": {"en": ...}}``.
    """
    if column in row or "." not in column:
        return row.get(column, MISSING)
    outer, _, inner = column.partition(".")
    within = row.get(outer)
    return _cell(within, inner) if isinstance(within, Mapping) else MISSING


def _named(row: Mapping[str, object]) -> str:
    return ", ".join(_columns(row)) or "none"


def _columns(row: Mapping[str, object]) -> Iterator[str]:
    for name, cell in row.items():
        if isinstance(cell, Mapping) and cell:
            yield from (f"{name}.{inner}" for inner in _columns(cell))
        else:
            yield str(name)


def is_text(value: str) -> bool:
    """Return whether ``value`` can be written as UTF-8; half of a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def fraction_of(example: Mapping[str, object], roles: Roles | type[Roles]) -> float:
    """Return a number in [0, 1) that depends on what the example asks alone: the same question is
    always in the same split.
    """
    question = getattr(roles, "question", None)  # of a task; it may be a part of the roles alone
    asked = question(example) if question else all_but_answers(example, roles)
    digest = hashlib.blake2b(
        json.dumps(asked, ensure_ascii=False, default=str).encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") / 2**64


def all_but_answers(example: Mapping[str, object], roles: Roles | type[Roles]) -> dict[str, object]:
    """Return what an example asks, where every role that is no answer says a part of it; a role
    that is empty says nothing.
    """
    return {
        role: value
        for role, value in sorted(example.items())
        if role != "id" and role not in roles.answers and value not in (None, "")
    }
