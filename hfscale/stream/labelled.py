"""Labelled examples, split by a hash, and their features, cached by content.

    CACHE/examples/DIGEST/features.arrow    one row a feature: what the task made, "example" (a
                                            number) and "length" (tokens)
    CACHE/examples/DIGEST/examples.arrow    one row an example: "id" and the whole of it as JSON
    CACHE/examples/DIGEST/report.json       what was left out or cut, with examples of it

The digest is of the tables' bytes, the columns, the task's code and options, and the tokenizer:
nothing is ever found that would be made differently. A folder appears whole, by a rename; processes
that want the same one wait for each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from hfscale.config.finetune import Examples
from hfscale.control_tokens import NotText
from hfscale.errors import ConfigError, DataError, counted
from hfscale.log import logger, progress_bar
from hfscale.records import load
from hfscale.shards.files import locked
from hfscale.shards.tables import table_digest
from hfscale.stream.examples import BadExample, Example, Facts, Feature
from hfscale.stream.roles import Roles, fraction_of, read_examples

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 3  # bad examples that a report names
VERSION = 4  # of what is cached


T = TypeVar("T")


def _kept(file: Path, kind: type[T]) -> T:
    remedy = f"remove the folder {file.parent}: it is made again"
    return load(file, kind, what="what was kept of the examples", remedy=remedy)


@dataclass
class Report:
    """What is in a split."""

    examples: int = 0
    features: int = 0
    truncated: int = 0  # examples
    unlearnt: dict[str, int] = field(default_factory=dict)  # why -> examples
    bad: int = 0  # examples that were left out
    shown: list[str] = field(default_factory=list)  # some of these
    digest: str = ""  # of the features


@dataclass
class Split:
    """The features and examples of a split, as they lie in the cache."""

    folder: Path

    @cached_property
    def report(self) -> Report:
        """What is in it."""
        return _kept(self.folder / "report.json", Report)

    @cached_property
    def features(self) -> Dataset:
        """The features, memory-mapped."""
        return _mapped(self.folder / "features.arrow")

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each feature (N)."""
        return _column(self.features, "length")

    @cached_property
    def of(self) -> np.ndarray:
        """The number of the example of each feature (N)."""
        return _column(self.features, "example")

    @property
    def fingerprint(self) -> str:
        """The digest of the features: the same whatever files, options and code they were made
        of.
        """
        return self.report.digest

    def examples(self) -> list[Example]:
        """Return all examples, in the order of their numbers."""
        return [
            json.loads(text)
            for text in _mapped(self.folder / "examples.arrow").data.column("example").to_pylist()
        ]


class LabelledData:
    """The splits of a config's ``data``, for a task."""

    def __init__(self, data: Examples, roles: Roles | type[Roles], *, about: str) -> None:
        """``about`` names the code of the task and its options, whatever changes what it finds in
        examples.
        """
        self.data, self.roles, self._about = data, roles, about
        self._folder = (
            data.cache
            or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hfscale"
        ) / "examples"
        held_out = {
            name: part
            for name in ("test", "validation")
            if isinstance(part := getattr(data, name), float)
        }
        self._digests = dict[tuple[str, str], str]()  # of tables that were read
        self._parts, begin = dict[str, tuple[float, float]](), 0.0
        for name, part in held_out.items():
            self._parts[name] = (begin, begin + part)
            begin += part
        self._parts["train"] = (begin, 1.0)

    def examples(self, split: str, *, answers: bool = True) -> Iterator[Example]:
        """Yield the examples of a split: ``train``, ``validation``, ``test``; ``id`` is the row's
        number in its table if it has none.

        Raises:
            DataError: as ``read_examples``.
        """
        begin, end = self._parts.get(split, (0.0, 1.0))
        for _, example in read_examples(
            self.table(split),
            self.roles,
            columns=self.data.columns,
            answers=answers,
            subset=self.data.subset,
            split="train" if split in self._parts else split,
        ):
            if (begin, end) == (0.0, 1.0) or begin <= fraction_of(example, self.roles) < end:
                yield example

    def table(self, split: str) -> str:
        """Return the table that a split is in: its own, or for a fraction that of ``train``.

        Raises:
            ConfigError: if the config names none.
        """
        chosen = self.data.train if split in self._parts else getattr(self.data, split)
        if chosen is None:
            raise ConfigError(
                f"there is no {split} split",
                where=f"data.{split}",
                remedy=f"name its file, or a fraction: data.{split}=0.1",
            )
        return str(chosen)

    def facts(self, find: Callable[[Iterable[Example]], Facts]) -> Facts:
        """Return what ``find`` finds in all training examples, cached.

        Raises:
            DataError: where the examples contradict each other.
        """

        def build(folder: Path) -> None:
            try:
                (folder / "facts.json").write_text(
                    json.dumps(find(self.examples("train")), ensure_ascii=False), "utf-8"
                )
            except BadExample as error:
                raise DataError(
                    str(error),
                    where=self.table("train"),
                    remedy="mend the examples, or say more in task.options",
                ) from error

        folder = self._made(self.digest("train", "facts"), build)
        return cast(Facts, _kept(folder / "facts.json", dict[str, object]))

    def prepared(
        self,
        split: str,
        features: Callable[[Example], Sequence[Feature]],
        *,
        about: str,
    ) -> Split:
        """Return a split with the features of its examples, made now or found; ``about`` names what
        ``features`` depends on.

        Raises:
            DataError: for examples that cannot be used, unless ``data.on_error`` is skip; and if
                none is left.
        """
        where = self.table(split)
        made = Split(
            self._made(
                self.digest(split, about), lambda folder: self._write(folder, split, features)
            )
        )
        report = made.report
        say = f"{split}: {report.examples:,} examples in {report.features:,} features"
        if report.truncated:
            share = report.truncated / report.examples
            say += (
                f"; {report.truncated:,} ({share:.1%}) were cut to "
                f"data.max_length={self.data.max_length} tokens"
            )
        logger.info(say)
        for why, count in report.unlearnt.items():
            logger.warning(f"{split}: {counted(count, 'example')} cannot be learnt from: {why}")
        if report.bad and self.data.on_error == "stop":
            raise DataError(
                f"{report.bad:,} examples of {split} cannot be used",
                where=where,
                value=report.shown,
                remedy="mend them, or leave them out with data.on_error=skip",
            )
        if report.bad:
            logger.warning(
                f"{split}: {counted(report.bad, 'example')} left out, such as "
                f"{'; '.join(report.shown)}"
            )
        useless = split == "train" and sum(report.unlearnt.values()) == report.examples
        if not report.features or useless:
            few = (
                f"; data.{split} is a share of the texts that differ, and these are few"
                if split in self._parts
                else ""
            )
            raise DataError(
                f"no example of {split} is left",
                where=where,
                value=report.shown or [*report.unlearnt] or report.examples,
                remedy=f"give more or other examples{few}",
            )
        return made

    def _write(
        self,
        folder: Path,
        split: str,
        features: Callable[[Example], Sequence[Feature]],
    ) -> None:
        from datasets.arrow_writer import ArrowWriter

        content = hashlib.blake2b(digest_size=16)
        report = Report()
        with (
            ArrowWriter(path=str(folder / "features.arrow")) as rows,
            ArrowWriter(path=str(folder / "examples.arrow")) as examples,
            progress_bar(f"preparing {split}", None, unit=" examples") as bar,
        ):
            for example in self.examples(split):
                bar.update()
                try:
                    made = list(features(example))
                    cut = [feature.pop("truncated", False) for feature in made]
                    useless = {feature.pop("unlearnt", "") for feature in made} - {""}
                    if any(cut) and self.data.too_long == "refuse":
                        raise BadExample(
                            f"it is longer than data.max_length={self.data.max_length} tokens"
                        )
                except (BadExample, NotText) as error:
                    report.bad += 1
                    report.shown = [*report.shown, f"{example['id']}: {error}"][:SHOWN]
                    continue
                for feature in made:
                    content.update(json.dumps(feature, sort_keys=True).encode())
                    rows.write(
                        {
                            **feature,
                            "example": report.examples,
                            "length": len(feature["input_ids"]),
                        }
                    )
                examples.write(
                    {
                        "id": example["id"],
                        "example": json.dumps(example, ensure_ascii=False, default=str),
                    }
                )
                report.truncated += any(cut)
                for why in useless:
                    report.unlearnt[why] = report.unlearnt.get(why, 0) + 1
                report.features += len(made)
                report.examples += 1
            for writer in (rows, examples) if report.features else ():
                writer.finalize()
        report.digest = content.hexdigest()
        (folder / "report.json").write_text(json.dumps(asdict(report), ensure_ascii=False), "utf-8")

    def digest(self, split: str, about: str = "") -> str:
        """Return what names the examples of a split, as they are read for this task, and what is
        made of them.
        """
        data = self.data
        table, part = self.table(split), "train" if split in self._parts else split
        if (table, part) not in self._digests:  # which takes reading all of it
            digest = table_digest(table, subset=data.subset, split=part)
            self._digests[table, part] = digest
        said = [
            VERSION,
            self._digests[table, part],
            self._parts.get(split),
            data.columns,
            data.max_length,
            data.too_long,
            self._about,
            about,
        ]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()

    def _made(self, name: str, build: Callable[[Path], None]) -> Path:
        """Return the folder ``name`` of the cache, after ``build`` has filled it if it was not
        there.
        """
        folder = self._folder / name
        if folder.is_dir():
            return folder
        with locked(self._folder / f".{name}.lock"):
            if not folder.is_dir():
                with TemporaryDirectory(
                    prefix=f".{name}.", dir=self._folder, ignore_cleanup_errors=True
                ) as scratch:
                    partial = Path(scratch) / name
                    partial.mkdir()
                    build(partial)
                    partial.rename(folder)
        return folder


def _column(features: Dataset, name: str) -> np.ndarray:
    numbers: np.ndarray = features.data.column(name).to_numpy()
    return numbers


def _mapped(file: Path) -> Dataset:
    import datasets

    return datasets.Dataset.from_file(str(file))
