"""From what a YAML file, the files it extends and overrides say (``tree.py``) to one frozen config
that knows where each value came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, get_args, overload

import yaml
from pydantic import BaseModel, ValidationError

from hfscale.config import kinds
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.config.section import Section
from hfscale.config.tree import COMMAND_LINE, Tree, read_tree, with_overrides
from hfscale.errors import PASSWORD, ConfigError, counted, nearest, shown

DEFAULT = "default"
MISSING = object()  # None is a value
S = TypeVar("S", bound=Section)
C = TypeVar("C", bound=Section, covariant=True)


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A valid config; ``sources`` gives file:line or the command line for every key that somebody
    wrote.
    """

    config: C
    sources: dict[str, str]

    def source(self, key: str, default: str = DEFAULT) -> str:
        """Return where the value of ``key`` came from, ``default`` if nobody wrote it; one inside a
        list or mapping came with it.
        """
        return _source(self.sources, key, default)


def _source(sources: Mapping[str, str], key: str, default: str) -> str:
    while key:
        if key in sources:
            return sources[key]
        key = key.rpartition(".")[0] if key.rpartition(".")[2].isdigit() else ""
    return default


# ------------------------------------------------------------------------------------------- public
@overload
def load_config(
    path: Path | str, overrides: Sequence[str] = (), *, decided: bool = False
) -> Loaded[TrainConfig]: ...
@overload
def load_config(
    path: Path | str, overrides: Sequence[str] = (), *, schema: type[S]
) -> Loaded[S]: ...
def load_config(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    schema: type[Section] | None = None,
    decided: bool = False,
) -> Loaded[Section]:
    """Return the valid, frozen config of ``path`` with ``overrides`` (``key=value``, values in
    YAML) on top.

    Without ``schema`` its sections say what it is (``kinds.py``). What it permits to code of others
    counts only as ``config/permission.py`` says; ``decided``: a launcher of ours wrote it, and has
    settled that.

    Raises:
        ConfigError: with everything that is wrong, not only the first thing; each with its file and
            line.
    """
    return _validated(read_tree(path, overrides), path, schema, decided=decided)


def load_values(values: Mapping[str, object], overrides: Sequence[str], *, schema: type[S]) -> S:
    """Return the config of ``values``, which no file says, with ``overrides`` on top.

    Raises:
        ConfigError: as ``load_config``.
    """
    tree = with_overrides(Tree(dict(values)), overrides)
    config = _validated(tree, COMMAND_LINE, schema, decided=True).config
    assert isinstance(config, schema)
    return config


def _validated(
    tree: Tree, path: Path | str, schema: type[Section] | None, *, decided: bool = False
) -> Loaded[Section]:
    schema = schema or kinds.kind_of(tree.values)
    for key, value in flatten(tree.values):
        if isinstance(value, str) and PASSWORD.search(value):
            where = _source(tree.sources, key, str(path))
            raise ConfigError(
                "a password stands in a URL: it would go into config.yaml and the logs",
                where=f"{where}: {key}",  # without the value
                remedy="put it into ~/.netrc (machine HOST login NAME password WORD) and take "
                "it out of the URL",
            )
    texts = [(ascii(key)[1:-1], _unprintable(key, value)) for key, value in flatten(tree.values)]
    if unprintable := [(key, what) for key, what in texts if what]:
        raise _report(path, tree, unprintable)
    try:
        config = schema.model_validate(tree.values)
    except ValidationError as error:
        raise _report(path, tree, _problems(error, tree, schema)) from None
    if problems := kinds.problems(config):
        raise _report(path, tree, problems)
    if not decided:
        typed = {key for key, source in tree.sources.items() if source == COMMAND_LINE}
        config, taken_back = kinds.permitted(config, said=typed, home=Path(path).parent)
        for key in taken_back:
            where = tree.sources.get(key, str(path))
            tree.sources[key] = f"{where} says true, which only the command line can"
    return Loaded(config, tree.sources)


def to_yaml(config: Section) -> str:
    """Return a YAML text that loads to an equal config, every default written out."""
    return yaml.dump(
        config.model_dump(mode="json", by_alias=True),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=120,
    )


def json_schema(schema: type[Section] = RunConfig) -> dict[str, object]:
    """Return a JSON schema for editors. Nothing is required at the top, because a file may extend
    others.
    """
    described = schema.model_json_schema(by_alias=True)
    described.pop("required", None)
    text = {"type": "string"}
    described["properties"]["extends"] = {
        "description": "files this one builds on, relative to it; the later wins",
        "anyOf": [text, {"type": "array", "items": text}],
    }
    return described


def flatten(values: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield ``(dotted key, value)`` for every leaf; an empty mapping or list is a leaf."""
    if values and isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


# ------------------------------------------------------------------------------------------ reading
class _Dumper(yaml.SafeDumper):
    """Quotes every text that begins like a number: versions of YAML disagree about 1e-3 and
    24:00:00, and any reader gets a text back.
    """

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar(
            "tag:yaml.org,2002:str", data, style="'" if re.match(r"[-+.\d]", data) else None
        )

    yaml_representers = {
        **yaml.SafeDumper.yaml_representers,
        str: represent_str,  # type: ignore[dict-item]  # of this class alone
    }


def _unprintable(key: str, value: object) -> str:
    """Return what is wrong with a key and its value as text, "" if nothing is: no system takes NUL
    or half a character.
    """
    for text in (key, value):
        if isinstance(text, str) and ("\0" in text or not _is_utf8(text)):
            return f"{text!a:.80}: holds NUL or half a character (a surrogate)"
    return ""


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------- errors
def _problems(error: ValidationError, tree: Tree, schema: type[Section]) -> list[tuple[str, str]]:
    """Return ``(key, what is wrong)`` once a key: pydantic reports every branch of a union by
    itself.
    """
    by_key: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        here: object = tree.values
        parts: list[str] = []
        # the location goes on with names of union branches, which are not keys
        for part in item["loc"]:
            inner = _within(here, part)
            if inner is not MISSING:
                here = inner
                parts.append(str(part))
            elif item["type"] == "missing":
                parts.append(str(part))
        key = ".".join(parts)
        if item["type"] == "missing":
            message = "is required"
        elif item["type"] == "extra_forbidden":
            message = f"unknown key; {_nearest_key(parts, schema)}"
        else:
            message = f"{here!r:.80}: {item['msg'][0].lower()}{item['msg'][1:]}".replace(
                "input should", "should"
            )
        by_key.setdefault(key, []).append(message)
    return [(key, "; or ".join(dict.fromkeys(messages))) for key, messages in by_key.items()]


def _within(values: object, part: int | str) -> object:
    """Return what is under a key or a number, or MISSING."""
    if isinstance(values, dict):
        return values.get(part, MISSING)
    if isinstance(values, list) and isinstance(part, int) and part < len(values):
        return values[part]
    return MISSING


def _fields(schema: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Return the keys of a section, with the section below a key or None."""

    def below(annotation: object) -> type[BaseModel] | None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        return next((section for part in get_args(annotation) if (section := below(part))), None)

    return {
        info.alias or name: below(info.annotation) for name, info in schema.model_fields.items()
    }


def _nearest_key(parts: list[str], schema: type[BaseModel]) -> str:
    """Return the nearest valid keys of the same section; or the same key where it belongs, if it
    was put in a wrong section.
    """
    *sections, name = parts
    section: type[BaseModel] | None = schema
    for part in sections:
        section = section if part.isdigit() or section is None else _fields(section)[part]
    elsewhere = [
        f"{top}.{name}"
        for top, below in _fields(schema).items()
        if below and name in _fields(below)
    ]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return nearest(name, [*_fields(section)] if section else [])


def _by_number(line: str) -> list[int | str]:
    """Return what sorts lines as people count: 10 comes after 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", line)]


def _written(key: str, tree: Tree, path: Path | str) -> str:
    """Return where ``key`` was written: by the override that made a section of this name, if no
    file has one.
    """
    below = {source for known, source in tree.sources.items() if known.startswith(f"{key}.")}
    return _source(tree.sources, key, COMMAND_LINE if below == {COMMAND_LINE} else str(path))


def _report(path: Path | str, tree: Tree, problems: list[tuple[str, str]]) -> ConfigError:
    """Return one error that lists all problems in the order of their lines."""
    entries = (f"{_written(key, tree, path)}: {key}: {message}" for key, message in problems)
    lines = sorted(map(shown, entries), key=_by_number)
    return ConfigError(
        "\n  ".join([f"{counted(len(lines), 'error')} in the config {path}", *lines]),
        remedy="`hfscale show --schema` prints every key with its type and default",
    )
