"""From a YAML file, the files it extends and `key=value` overrides to one frozen config that knows where each value came from.

Values are YAML 1.2's: `3e-4` is a number, `24:00:00` and `no` are strings. A key is written with dots, `data.sources.0.shards`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, overload

import yaml
from pydantic import BaseModel, ValidationError

from hfscale.config import permission, rules
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.inference import HarnessConfig, PredictConfig, ShardsConfig
from hfscale.config.schema import RunConfig, Section, TrainConfig
from hfscale.errors import PASSWORD, ConfigError, counted, nearest, shown
from hfscale.records import is_name, read_file

LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # libyaml's is there in most installations
CONFIG_BYTES, NODES, DEPTH = 1 << 20, 100_000, 50  # the most that a config has of each
COMMAND_LINE = "command line"
DEFAULT = "default"
CHOICES = {
    "train": ("steps", "epochs", "tokens"),
    "model": ("architecture", "pretrained"),
}  # one of each; the layer on top decides
KINDS: dict[str, type[Section]] = {
    "predict": PredictConfig,
    "harness": HarnessConfig,
    "evaluate": ShardsConfig,
    "task": FinetuneConfig,
    "objective": RunConfig,
}  # the first of these sections that is there says what a config is of
S = TypeVar("S", bound=Section)
_WORDS = {"": None, "~": None} | {
    spelled(word): value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelled in (str.lower, str.title, str.upper)
}


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """A valid config; ``sources`` gives file:line or the command line for every key that somebody wrote."""

    config: S
    sources: dict[str, str]

    def source(self, key: str, default: str = DEFAULT) -> str:
        """Return where the value of ``key`` came from, ``default`` if nobody wrote it; one inside a list or mapping came with it."""
        while key:
            if key in self.sources:
                return self.sources[key]
            key = key.rpartition(".")[0] if key.rpartition(".")[2].isdigit() else ""
        return default


@dataclass
class Tree:
    """Nested values as written, not yet checked, and the source of every key."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def merge(self, other: Tree) -> None:
        """Lay ``other`` on top: mappings are merged, everything else is replaced; so is what another choice leaves behind."""
        for section, choices in CHOICES.items():
            below, above = self.values.get(section), other.values.get(section)
            if (
                isinstance(below, dict)
                and isinstance(above, dict)
                and any(above.get(name) is not None for name in choices)
            ):
                left = [
                    name
                    for name in choices
                    if below.get(name) is not None and above.get(name) is None
                ]
                for key in [
                    *left,
                    *(["config"] if left and section == "model" else []),
                ]:  # sizes of new weights are not those of old ones
                    below.pop(key, None)
                    gone = f"{section}.{key}."
                    self.sources = {
                        known: source
                        for known, source in self.sources.items()
                        if not f"{known}.".startswith(gone)
                    }
        self.lay(other)

    def lay(self, other: Tree) -> None:
        """Lay ``other`` on top as ``merge`` does, without a decision between two choices: those of one layer are a contradiction."""
        self._merge(self.values, other.values, "")
        self.sources.update(other.sources)

    def _merge(self, below: Any, above: Any, prefix: str) -> None:
        for kind, belonging in (("architecture", "config"), ("name", "options")):
            if (
                isinstance(below, dict)
                and {kind, belonging} <= above.keys()
                and below.get(kind, above[kind]) != above[kind]
            ):
                below[belonging] = None
        for key, value in above.items():
            name = f"{prefix}{key}"
            if isinstance(below, list):  # only an override can say `sources.0.shards`
                if not (key.isdigit() and int(key) < len(below)):
                    raise ConfigError(
                        f"{prefix.rstrip('.')} is a list of {len(below)}",
                        where=COMMAND_LINE,
                        value=name,
                        remedy=f"count from 0 to {len(below) - 1}, or give the whole list",
                    )
                key = int(key)
            old = below[key] if isinstance(below, list) else below.get(key)
            if isinstance(value, dict) and (
                isinstance(old, dict) or (isinstance(old, list) and all(k.isdigit() for k in value))
            ):
                self._merge(old, value, f"{name}.")
            else:
                below[key] = value
                self.sources = {
                    known: source
                    for known, source in self.sources.items()
                    if not known.startswith(f"{name}.")
                }


# -------------------------------------------------------------------------------------------------- public
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
    schema: type[Any] | None = None,
    decided: bool = False,
) -> Loaded[Any]:
    """Return the valid, frozen config of ``path`` with ``overrides`` (``key=value``, values in YAML) on top.

    Without ``schema`` its sections say what it is (``KINDS``); a ``RunConfig``, where none of them does. What it permits to code of
    others counts only as ``config/permission.py`` says; ``decided``: a launcher of ours wrote it, and has settled that.

    Raises:
        ConfigError: with everything that is wrong, not only the first thing; each with its file and line.
    """
    return _validated(read_tree(path, overrides), path, schema, decided=decided)


def load_values(values: dict[str, Any], overrides: Sequence[str], *, schema: type[S]) -> S:
    """Return the config of ``values``, which no file says, with ``overrides`` on top.

    Raises:
        ConfigError: as ``load_config``.
    """
    tree = _with(Tree(values), overrides)
    return _validated(tree, COMMAND_LINE, schema, decided=True).config


def _validated(
    tree: Tree, path: Path | str, schema: type[Any] | None, *, decided: bool = False
) -> Loaded[Any]:
    schema = schema or next(
        (kind for section, kind in KINDS.items() if section in tree.values), RunConfig
    )
    for key, value in flatten(tree.values):
        if isinstance(value, str) and PASSWORD.search(value):
            loaded: Loaded[Any] = Loaded(None, tree.sources)
            where = loaded.source(key, default=str(path))
            raise ConfigError(
                "a password stands in a URL: it would go into config.yaml and the logs",
                where=f"{where}: {key}",  # without the value
                remedy="put it into ~/.netrc (machine HOST login NAME password WORD) and take it out of the URL",
            )
    texts = [(ascii(key)[1:-1], _unprintable(key, value)) for key, value in flatten(tree.values)]
    if unprintable := [(key, what) for key, what in texts if what]:
        raise _report(path, tree, unprintable)
    try:
        config = schema.model_validate(tree.values)
    except ValidationError as error:
        raise _report(path, tree, _problems(error, tree, schema)) from None
    problems = rules.problems(config) if isinstance(config, TrainConfig) else []
    if problems:
        raise _report(path, tree, problems)
    if isinstance(config, TrainConfig) and not decided:
        said = {key for key in permission.KEYS if tree.sources.get(key) == COMMAND_LINE}
        wanted, config = config, permission.settled(config, said=said, home=Path(path).parent)
        for key in permission.asked(wanted) - permission.asked(config):
            where = tree.sources.get(key, str(path))
            tree.sources[key] = f"{where} says true, which only the command line can"
    return Loaded(config, tree.sources)


def read_tree(path: Path | str, overrides: Sequence[str] = ()) -> Tree:
    """Return what ``path``, the files it extends and ``overrides`` say, unchecked."""
    return _with(_read(Path(path), chain=()), overrides)


def _with(tree: Tree, overrides: Sequence[str]) -> Tree:
    """Return ``tree`` with ``overrides`` laid on top."""
    written = Tree()
    for override in overrides:
        written.lay(_parse_override(override))
    tree.merge(written)
    return tree


def to_yaml(config: Section) -> str:
    """Return a YAML text that loads to an equal config, every default written out."""
    return yaml.dump(
        config.model_dump(mode="json", by_alias=True),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=120,
    )


def json_schema(schema: type[Section] = RunConfig) -> dict[str, Any]:
    """Return a JSON schema for editors. Nothing is required at the top, because a file may extend others."""
    described = schema.model_json_schema(by_alias=True)
    described.pop("required", None)
    text = {"type": "string"}
    described["properties"]["extends"] = {
        "description": "files this one builds on, relative to it; the later wins",
        "anyOf": [text, {"type": "array", "items": text}],
    }
    return described


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` for every leaf; an empty mapping or list is a leaf."""
    if values and isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


# -------------------------------------------------------------------------------------------------- reading
class _Dumper(yaml.SafeDumper):
    """Quotes every text that begins like a number: versions of YAML disagree about 1e-3 and 24:00:00, and any reader gets a text back."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar(
            "tag:yaml.org,2002:str", data, style="'" if re.match(r"[-+.\d]", data) else None
        )

    yaml_representers = yaml.SafeDumper.yaml_representers | {str: represent_str}  # type: ignore[assignment, operator]


def _compose(text: str, *, where: str) -> yaml.Node | None:
    try:
        _refuse_large(text, where)
        return yaml.compose(text, Loader=LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigError(
            f"not YAML: {getattr(error, 'problem', None) or error}",
            where=where,
            remedy="a text with { : # of its own stands between quotes; on the command line: 'key=\"{a}: b\"'",
        ) from None


def _refuse_large(text: str, where: str) -> None:
    """Return if the YAML ``text`` is one that a person may have written: not too deep, not too many values once anchors are followed.

    Raises:
        ConfigError: if it is not, or an anchor holds itself.
    """
    sizes: dict[str, float] = {}  # of what an anchor names, in nodes
    open_nodes: list[tuple[str | None, float]] = []  # anchor, and nodes before it
    total = 0.0
    for event in yaml.parse(text, Loader=LOADER):
        line = f"{where}:{event.start_mark.line + 1}" if event.start_mark else where
        problem, anchor = "", getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            total += sizes.get(str(anchor), 1.0)
            if anchor in [name for name, _ in open_nodes]:
                problem = f"the anchor {anchor} holds itself"
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((anchor, total - 1))
            elif anchor:
                sizes[anchor] = 1.0
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_nodes.pop()
            if name:
                sizes[name] = total - before
        if len(open_nodes) > DEPTH:
            problem = f"it is nested deeper than {DEPTH} levels"
        elif total > NODES:
            problem = f"it says more than {NODES:,} things, anchors followed"
        if problem:
            raise ConfigError(f"this is no config: {problem}", where=line)


def _read(path: Path, *, chain: tuple[Path, ...]) -> Tree:
    """Return the tree of a file, laid over the trees of what it extends."""
    if not is_name(path):
        raise ConfigError("this can be no file", where="command line", value=ascii(str(path)))
    if path.resolve() in chain:
        raise ConfigError(
            "configs extend each other in a circle",
            where=" -> ".join(p.name for p in (*chain, path)),
            remedy="take one `extends` out",
        )
    try:
        text = read_file(path, most=CONFIG_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(
            f"cannot read the config: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}",
            where=path,
            remedy=nearest(path.name, beside) if beside else "check the path",
        ) from None
    label = os.path.normpath(path)
    node, own = _compose(text, where=label), Tree()
    if node is not None:
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                "a config is a mapping of sections, and this file is not one",
                where=f"{label}:1",  # without what it says: that may be a secret
            )
        own.values = _plain(node, "", label, own.sources)
    bases = own.values.pop("extends", None) or []
    where = own.sources.pop("extends", label)
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError(
            "`extends` is a file or a list of files, relative to this one", where=where, value=bases
        )
    tree = Tree()
    for base in bases:
        file = path.parent / os.path.expanduser(base)
        if not (is_name(file) and file.is_file()):
            raise ConfigError(
                f"no such file to extend: {base}",
                where=where,
                value=str(file),
                remedy="it is relative to the file that says it",
            )
        tree.merge(_read(file, chain=(*chain, path.resolve())))
    tree.merge(own)
    return tree


def _plain(node: yaml.Node, prefix: str, file: str, sources: dict[str, str]) -> Any:
    """Return the plain value of a YAML node, and note the line of every key in ``sources``."""
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, where = str(key_node.value), f"{file}:{key_node.start_mark.line + 1}"
            if key in values:
                raise ConfigError(
                    f"{prefix}{key} is written twice",
                    where=where,
                    value=key,
                    remedy="keep one of them",
                )
            sources[f"{prefix}{key}"] = where
            values[key] = _plain(value_node, f"{prefix}{key}.", file, sources)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{prefix}{i}.", file, sources) for i, item in enumerate(node.value)]
    if not node.tag.startswith("tag:yaml.org,"):
        raise ConfigError(
            "tags have no meaning in a config",
            where=f"{file}:{node.start_mark.line + 1}",
            value=node.tag,
        )
    quoted = isinstance(node, yaml.ScalarNode) and node.style  # or a block of text
    return node.value if quoted else _scalar(node.value)


def _scalar(text: str) -> Any:
    """Return what an unquoted text stands for in YAML 1.2; PyYAML itself is 1.1, with `no`, sexagesimal numbers and a text `3e-4`."""
    if text in _WORDS:
        return _WORDS[text]
    for number in (int, float) if re.fullmatch(r"[-+.0-9_eE]+", text) else ():
        with suppress(ValueError):
            return number(text)  # type: ignore[operator]
    return text


def _parse_override(text: str) -> Tree:
    """Return the tree that holds the one value of ``key=value``."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", key):
        raise ConfigError(
            "an override is written key=value",
            where=COMMAND_LINE,
            value=text,
            remedy="for example train.steps=100",
        )
    tree = Tree()
    plain = value.strip()
    if not plain.startswith(("[", "{", '"', "'")) or plain in ("[", "{"):
        parsed: Any = _scalar(
            plain
        )  # one value: YAML's signs have no use in it; `|`, `-`, `#` mean themselves
    else:
        node = _compose(value, where=f"{COMMAND_LINE}, {key}")
        parsed = None if node is None else _plain(node, f"{key}.", COMMAND_LINE, tree.sources)
    tree.sources = dict.fromkeys([*tree.sources, key], COMMAND_LINE)
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    tree.values = parsed  # type: ignore[assignment]
    return tree


def _unprintable(key: str, value: Any) -> str:
    """Return what is wrong with a key and its value as text, "" if nothing is: no system takes NUL or half a character."""
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


# -------------------------------------------------------------------------------------------------- errors
def _problems(error: ValidationError, tree: Tree, schema: type[Section]) -> list[tuple[str, str]]:
    """Return ``(key, what is wrong)`` once a key: pydantic reports every branch of a union by itself."""
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        here: Any = tree.values
        parts: list[str] = []
        for part in item[
            "loc"
        ]:  # the location goes on with names of union branches, which are not keys
            is_key = (isinstance(here, dict) and part in here) or (
                isinstance(here, list) and isinstance(part, int) and part < len(here)
            )
            if is_key:
                here = here[part]
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
        found.setdefault(key, []).append(message)
    return [(key, "; or ".join(dict.fromkeys(messages))) for key, messages in found.items()]


def _fields(schema: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Return the keys of a section, with the section below a key or None."""

    def below(annotation: Any) -> type[BaseModel] | None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        return next((found for part in get_args(annotation) if (found := below(part))), None)

    return {
        info.alias or name: below(info.annotation) for name, info in schema.model_fields.items()
    }


def _nearest_key(parts: list[str], schema: type[BaseModel]) -> str:
    """Return the nearest valid keys of the same section; or the same key where it belongs, if it was put in a wrong section."""
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


def _report(path: Path | str, tree: Tree, problems: list[tuple[str, str]]) -> ConfigError:
    """Return one error that lists all problems in the order of their lines."""
    loaded: Loaded[Any] = Loaded(None, tree.sources)
    lines = sorted(
        (
            shown(f"{loaded.source(key, default=str(path))}: {key}: {message}")
            for key, message in problems
        ),
        key=lambda line: [
            int(part) if part.isdigit() else part for part in re.split(r"(\d+)", line)
        ],
    )
    return ConfigError(
        "\n  ".join([f"{counted(len(lines), 'error')} in the config {path}", *lines]),
        remedy="`hfscale show --schema` prints every key with its type and default",
    )
