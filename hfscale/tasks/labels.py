"""Labels of examples and of models: numbers or texts, in the order of a model's outputs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from hfscale.errors import ConfigError
from hfscale.stream.examples import BadExample

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _distinct(labels: list[str]) -> list[str]:
    if twice := [label for label in set(labels) if labels.count(label) > 1]:
        raise ValueError(f"{twice[0]!r} occurs twice")
    return labels


Labels = Annotated[list[str], AfterValidator(_distinct)]  # the whole set, in its order


def names_of(config: PretrainedConfig) -> list[str]:
    """Return the labels of a model in the order of their numbers, whatever the order in which its
    config lists them.
    """
    numbered = sorted((config.id2label or {}).items(), key=lambda item: int(item[0]))
    return [name for _, name in numbered]


def label_name(label: object) -> str:
    """Return a label as text; 1.0 is 1, as a table with gaps has it, also where the number is text,
    as csv has it.
    """
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(label))


def named(label: object, labels: Sequence[str]) -> str:
    """Return a label as text; where ``labels`` are names, a number counts from 0 among them, as in
    data sets of the hub.
    """
    name = str(label) if str(label) in labels else label_name(label)
    if (
        name in labels
        or not (name.isascii() and name.isdecimal())
        or int(name) >= len(labels)
        or any(map(str.isdecimal, labels))
    ):
        return name
    return labels[int(name)]


def known_labels(own: list[str], given: list[str] | None) -> list[str]:
    """Return the labels of a model: its ``own``, or those ``given`` where its own are but numbers
    (LABEL_0).

    Raises:
        ConfigError: if those given are not its own: they say how the data's labels are numbered,
            and all must be known to the model.
    """
    if not given or not own:
        return own
    if len(given) == len(own) and all(re.fullmatch(r"LABEL_\d+", label) for label in own):
        return given
    if unknown := [label for label in given if label not in own]:
        raise ConfigError(
            "the model has no such label",
            where="task.options.labels",
            value=unknown[0],
            remedy=f"name its own, in the order of the data's numbers: {', '.join(own):.300}",
        )
    return own


def all_labels(values: Iterable[object]) -> list[str]:
    """Return the distinct labels (of lists, their members) as texts: numbers by size, also as
    texts, else by the alphabet.

    What is no label (nothing, a list in a list, not a number) is left out here: ``features`` then
    names the example.

    Raises:
        BadExample: for two that look alike: they differ by spaces around them, or by how a letter
            is written in Unicode.
    """
    members = chain.from_iterable(value if isinstance(value, list) else [value] for value in values)
    labels = {
        label_name(label)
        for label in members
        if isinstance(label, (str, int)) or (isinstance(label, float) and isfinite(label))
    }
    looks = dict[str, str]()
    for name in sorted(labels):
        look = " ".join(unicodedata.normalize("NFC", name).split())
        if (other := looks.setdefault(look, name)) != name:
            raise BadExample(f"the labels {other!r} and {name!r} look alike: write them alike")
    sizes = {name: float(name) for name in labels if re.fullmatch(r"-?\d+(\.\d+)?", name)}
    return sorted(labels, key=lambda name: (name not in sizes, sizes.get(name, 0.0), name))
