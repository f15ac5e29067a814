"""What a YAML file, the files it extends and `key=value` overrides say: values as written, and the
source of every key.

Values are YAML 1.2's: `3e-4` is a number, `24:00:00` and `no` are strings. A key is written with
dots, `data.sources.0.shards`. Nothing is checked here but that a person may have written it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from hfscale.errors import ConfigError, nearest
from hfscale.records import is_name, read_file

LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # libyaml's is there in most installations
CONFIG_BYTES, NODES, DEPTH = 1 << 20, 100_000, 50  # the most that a config has of each
COMMAND_LINE = "command line"
# one of each; the layer on top decides
CHOICES = {
    "train": ("steps", "epochs", "tokens"),
    "model": ("architecture", "pretrained"),
}
_WORDS = {"": None, "~": None} | {
    spelled(word): value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelled in (str.lower, str.title, str.upper)
}


@dataclass
class Tree:
    """Nested values as written, not yet checked, and the source of every key."""

    values: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def merge(self, other: Tree) -> None:
        """Lay ``other`` on top: mappings are merged, everything else is replaced; so is what
        another choice leaves behind.
        """
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
                # sizes of new weights are not those of old ones
                for key in [
                    *left,
                    *(["config"] if left and section == "model" else []),
                ]:
                    below.pop(key, None)
                    gone = f"{section}.{key}."
                    self.sources = {
                        known: source
                        for known, source in self.sources.items()
                        if not f"{known}.".startswith(gone)
                    }
        self.lay(other)

    def lay(self, other: Tree) -> None:
        """Lay ``other`` on top as ``merge`` does, without a decision between two choices: those of
        one layer are a contradiction.
        """
        self._merge(self.values, other.values, "")
        self.sources.update(other.sources)

    def _merge(
        self, below: dict[str, object] | list[object], above: dict[str, object], prefix: str
    ) -> None:
        for kind, belonging in (("architecture", "config"), ("name", "options")):
            if (
                isinstance(below, dict)
                and {kind, belonging} <= above.keys()
                and below.get(kind, above[kind]) != above[kind]
            ):
                below[belonging] = None
        for key, value in above.items():
            name = f"{prefix}{key}"
            # only an override can say `sources.0.shards`
            if isinstance(below, list) and not (key.isdigit() and int(key) < len(below)):
                raise ConfigError(
                    f"{prefix.rstrip('.')} is a list of {len(below)}",
                    where=COMMAND_LINE,
                    value=name,
                    remedy=f"count from 0 to {len(below) - 1}, or give the whole list",
                )
            old = below[int(key)] if isinstance(below, list) else below.get(key)
            if isinstance(value, dict) and (
                isinstance(old, dict) or (isinstance(old, list) and all(k.isdigit() for k in value))
            ):
                self._merge(old, value, f"{name}.")
            else:
                if isinstance(below, list):
                    below[int(key)] = value
                else:
                    below[key] = value
                self.sources = {
                    known: source
                    for known, source in self.sources.items()
                    if not known.startswith(f"{name}.")
                }


def read_tree(path: Path | str, overrides: Sequence[str] = ()) -> Tree:
    """Return what ``path``, the files it extends and ``overrides`` say, unchecked."""
    return with_overrides(_read(Path(path), chain=()), overrides)


def with_overrides(tree: Tree, overrides: Sequence[str]) -> Tree:
    """Return ``tree`` with ``overrides`` laid on top."""
    written = Tree()
    for override in overrides:
        written.lay(_parse_override(override))
    tree.merge(written)
    return tree


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
            remedy="a text with { : # of its own stands between quotes; on the command line: "
            "'key=\"{a}: b\"'",
        ) from None


def _refuse_large(text: str, where: str) -> None:
    """Return if the YAML ``text`` is one that a person may have written: not too deep, not too many
    values once anchors are followed.

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
        own.values = _mapping(node, "", label, own.sources)
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


def _mapping(
    node: yaml.MappingNode, prefix: str, file: str, sources: dict[str, str]
) -> dict[str, object]:
    """Return the values of a mapping, as ``_plain`` does."""
    values: dict[str, object] = {}
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


def _plain(node: yaml.Node, prefix: str, file: str, sources: dict[str, str]) -> object:
    """Return the plain value of a YAML node, and note the line of every key in ``sources``."""
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, prefix, file, sources)
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


def _scalar(text: str) -> str | int | float | None:
    """Return what an unquoted text stands for in YAML 1.2; PyYAML itself is 1.1, with `no`,
    sexagesimal numbers and a text `3e-4`.
    """
    if text in _WORDS:
        return _WORDS[text]
    for number in (int, float) if re.fullmatch(r"[-+.0-9_eE]+", text) else ():
        with suppress(ValueError):
            return number(text)
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
        # one value: YAML's signs have no use in it; `|`, `-`, `#` mean themselves
        parsed: object = _scalar(plain)
    else:
        node = _compose(value, where=f"{COMMAND_LINE}, {key}")
        parsed = None if node is None else _plain(node, f"{key}.", COMMAND_LINE, tree.sources)
    tree.sources = dict.fromkeys([*tree.sources, key], COMMAND_LINE)
    section, *inner = key.split(".")
    for part in reversed(inner):
        parsed = {part: parsed}
    tree.values = {section: parsed}
    return tree
