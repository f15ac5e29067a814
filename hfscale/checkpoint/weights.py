"""One way to read a model's weights, tensor by tensor, wherever they come from: a run, a checkpoint
of any stage, a transformers folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from hfscale.checkpoint import layout
from hfscale.checkpoint.base import check_base
from hfscale.checkpoint.manifest import SMALL, verify
from hfscale.checkpoint.state import Adapters
from hfscale.checkpoint.store import FragmentReader, TensorFile, tensors_in
from hfscale.dist.agree import from_all_ranks
from hfscale.dist.group import everybody
from hfscale.errors import CheckpointError
from hfscale.models.adapters import ADAPTER_CONFIG, is_adapter, pair_of, without_adapter
from hfscale.records import Record, load

BLOCK_ROWS = 4096
Check = Callable[[Path], list[str]]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"  # transformers' names


class _Index(Record):
    weight_map: dict[str, Annotated[str, Field(pattern=r"^[\w\-.]+\.safetensors$")]]


class WeightsReader(Protocol):
    """Tensors by name. Nothing is in memory but what was asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read_slice(self, name: str, *, start: int, numel: int) -> Tensor:
        """Return elements ``start .. start + numel`` of the flattened tensor, 1-D."""
        ...

    def home(self, name: str) -> str:
        """Return the name under which the tensor is stored: another one, if it is tied."""
        return name

    def read(self, name: str) -> Tensor:
        """Return the whole tensor."""
        shape = torch.Size(self.shape(name))
        return self.read_slice(name, start=0, numel=shape.numel()).view(shape)


@dataclass(frozen=True)
class Match:
    """Where a model's tensors come from. Missing parameters keep their first weights (a new head,
    say); unexpected ones are not read.
    """

    sources: dict[str, str]  # name in the model -> name in the reader
    missing: Sequence[str]
    unexpected: Sequence[str]
    # names in the model of what has a row (or number) an id, and more ids than its source
    grown: Sequence[str]
    rows: Sequence[int]  # ids there, and in the model

    def shape(self, reader: WeightsReader, name: str) -> tuple[int, ...]:
        """Return the shape of the model's tensor ``name``."""
        there = reader.shape(self.sources[name])
        if name not in self.grown:
            return there
        old, new = self.rows
        return tuple(new if size == old else size for size in there)

    def read_slice(self, reader: WeightsReader, name: str, *, start: int, numel: int) -> Tensor:
        """Return elements of the model's flattened tensor ``name``; fp32, where it has grown.

        New ids: the mean keeps the old ids' probabilities almost as they were (Hewitt 2021,
        "Initializing new word embeddings").
        """
        there = self.sources[name]
        if name not in self.grown:
            return reader.read_slice(there, start=start, numel=numel)
        size = torch.Size(reader.shape(there)).numel()
        values = torch.empty(numel)
        old = min(max(size - start, 0), numel)
        if old:
            values[:old] = reader.read_slice(there, start=start, numel=old)
        if old < numel:
            mean = _mean_row(reader, there, rows=self.rows[0])
            values[old:] = mean[torch.arange(start + old, start + numel) % len(mean)]
        return values


def _mean_row(reader: WeightsReader, name: str, *, rows: int) -> Tensor:
    """Return the mean of all rows (float64), read block by block; of a vector with a number an id:
    of its numbers.
    """
    width = torch.Size(reader.shape(name)).numel() // rows
    total = torch.zeros(width, dtype=torch.float64)
    for first in range(0, rows, BLOCK_ROWS):
        count = min(BLOCK_ROWS, rows - first)
        total += (
            reader.read_slice(name, start=first * width, numel=count * width)
            .view(count, width)
            .double()
            .sum(0)
        )
    return total / rows


def open_weights(path: str | Path, *, check: Check = verify) -> WeightsReader:
    """Return a reader of the weights at ``path``: a run (its newest checkpoint), a checkpoint, or a
    folder of transformers.

    ``check`` says what is wrong with a checkpoint.

    Raises:
        CheckpointError: if there are none, a checkpoint does not match its manifest, or the base of
            its adapters has changed.
    """
    if checkpoint := layout.checkpoint_of(path):
        saved = CheckpointWeights(checkpoint, check=check)
        if saved.state.adapters is None:
            return saved
        check_base(saved.state.adapters, where=checkpoint)
        return MergedWeights(saved, saved.state.adapters, check=check)
    if not Path(path).is_dir():
        raise CheckpointError(
            "there is no such folder",
            where=path,
            remedy="name a run, a checkpoint or a transformers folder",
        )
    return FolderWeights(Path(path))


def verify_together(checkpoint: Path) -> list[str]:
    """Return what is wrong with a checkpoint, found by all ranks together, each reading its part of
    the files. Collective.
    """
    place = everybody()
    by_rank = from_all_ranks(verify(checkpoint, part=place.rank, parts=place.size))
    return sorted({problem for problems in by_rank for problem in problems})


def checked(checkpoint: Path, check: Check = partial(verify, up_to=SMALL)) -> Path:
    """Return ``checkpoint`` if ``check`` finds nothing; by default it reads the small files only,
    before anybody believes them.

    Raises:
        CheckpointError: if it finds something.
    """
    if problems := check(checkpoint):
        raise CheckpointError(
            "the checkpoint is damaged and was not opened",
            where=checkpoint,
            value=problems[:5],
            remedy="name an older checkpoint of the run, or resume the run: it falls back by "
            "itself",
        )
    return checkpoint


class CheckpointWeights(WeightsReader):
    """The fp32 weights of a committed checkpoint, verified first. A tied name reads the tensor it
    is tied to.
    """

    def __init__(self, checkpoint: Path, *, check: Check = verify) -> None:
        self._reader = FragmentReader(checked(checkpoint, check))
        self.state = layout.state_of(checkpoint)
        self._tied = self.state.tied

    def names(self) -> list[str]:
        return [*self._reader.shapes, *self._tied]

    def home(self, name: str) -> str:
        return self._tied.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shapes[self.home(name)]

    def read_slice(self, name: str, *, start: int, numel: int) -> Tensor:
        home = self.home(name)
        return self._reader.read(
            home, "weight", start=start, out=torch.empty(numel, dtype=self._reader.dtype(home))
        )


class MergedWeights(WeightsReader):
    """What adapters were trained to: W + scale * B A of each target; the rest as it is in their
    checkpoint, or in the base's ``folder``.
    """

    def __init__(self, saved: CheckpointWeights, adapters: Adapters, *, check: Check) -> None:
        self.saved, self.folder = saved, adapters.folder
        self.scale, self.targets = adapters.scale, adapters.targets
        self.base = open_weights(self.folder, check=check)
        saved_match = adapters.match
        self.match = Match(
            saved_match.sources,
            missing=saved_match.missing,
            unexpected=saved_match.unexpected,
            grown=saved_match.grown,
            rows=saved_match.rows,
        )
        trained = [name for name in saved.names() if not is_adapter(name)]
        self.own = {without_adapter(name): name for name in trained if saved.home(name) == name}
        self.plain = {without_adapter(name): name for name in [*self.match.sources, *trained]}

    def names(self) -> list[str]:
        return [*self.plain]

    def home(self, name: str) -> str:
        return without_adapter(self.saved.home(self.plain[name]))

    def shape(self, name: str) -> tuple[int, ...]:
        inside = self.plain[self.home(name)]
        return (
            self.saved.shape(inside)
            if inside in self.own.values()
            else self.match.shape(self.base, inside)
        )

    def read(self, name: str) -> Tensor:
        name = self.home(name)
        shape, inside, module = self.shape(name), self.plain[name], name.removesuffix(".weight")
        value = (
            self.saved.read(inside)
            if name in self.own
            else (
                self.match.read_slice(
                    self.base, inside, start=0, numel=torch.Size(shape).numel()
                ).view(shape)
            )
        )
        if module == name or module not in self.targets:
            return value
        a, b = map(self.saved.read, pair_of(module))
        delta = b @ a * self.scale
        return value.float() + (delta.T if self.targets[module] else delta)

    def read_slice(self, name: str, *, start: int, numel: int) -> Tensor:
        return self.read(name).reshape(-1)[start : start + numel]


def refuse_adapter(folder: Path) -> None:
    """Return if ``folder`` holds a model, and no adapter.

    Raises:
        CheckpointError: if it does: some readers would add it, and some would not.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            "this folder holds an adapter, which is not a model",
            where=folder,
            value=ADAPTER_CONFIG,
            remedy="merge it into its base (hfscale export RUN OUT without --adapter, or "
            "peft's merge_and_unload); "
            f"if the weights here are whole without it, take {ADAPTER_CONFIG} away",
        )


class FolderWeights(WeightsReader):
    """The safetensors of a transformers folder, one file or several."""

    def __init__(self, folder: Path) -> None:
        refuse_adapter(folder)
        try:
            if (folder / INDEX).is_file():
                where = load(folder / INDEX, _Index, what="the index of the weights").weight_map
            elif (folder / SINGLE).is_file():
                with tensors_in(folder / SINGLE) as file:
                    where = dict.fromkeys(file.keys(), SINGLE)
            else:
                raise CheckpointError(
                    "no safetensors weights here",
                    where=folder,
                    value=sorted(p.name for p in folder.glob("*"))[:10],
                    remedy="save the model with transformers' save_pretrained; pickled weights "
                    "(.bin) are not opened",
                )
            opened = {name: tensors_in(folder / name) for name in sorted(set(where.values()))}
            self._tensors: dict[str, TensorFile] = {
                tensor: opened[file] for tensor, file in where.items()
            }
            for name in where:
                self.shape(name)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                "a file of the weights is missing or damaged",
                where=folder,
                value=str(error).splitlines()[0],
                remedy="copy the folder again, whole",
            ) from error

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].get_slice(name).get_shape())

    def read_slice(self, name: str, *, start: int, numel: int) -> Tensor:
        shape = self.shape(name)
        if not shape:
            return self._tensors[name].get_tensor(name).view(-1)[start : start + numel]
        # safetensors slices by rows: read those that cover the range
        row = torch.Size(shape[1:]).numel()
        first, last = start // row, -(-(start + numel) // row)
        rows = self._tensors[name].get_slice(name)[first:last]
        return rows.reshape(-1)[start - first * row :][:numel]
