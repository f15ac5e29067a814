"""One way to read a model's weights, tensor by tensor, wherever they come from: a run, a checkpoint of any stage, a transformers folder."""
from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfscale.checkpoint import layout
from hfscale.checkpoint.manifest import SMALL, verify
from hfscale.checkpoint.store import FragmentReader
from hfscale.errors import CheckpointError

Check = Callable[[Path], list[str]]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"  # transformers' names


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


def open_weights(path: str | Path, *, check: Check = verify) -> WeightsReader:
    """Return a reader of the weights at ``path``: a run (its newest checkpoint), a checkpoint, or a folder of transformers.

    ``check`` says what is wrong with a checkpoint.

    Raises:
        CheckpointError: if there are none, or a checkpoint does not match its manifest.
    """
    if checkpoint := layout.checkpoint_of(path):
        return CheckpointWeights(checkpoint, check=check)
    if not Path(path).is_dir():
        raise CheckpointError("there is no such folder", where=path, remedy="name a run, a checkpoint or a transformers folder")
    return FolderWeights(Path(path))


def checked(checkpoint: Path, check: Check = partial(verify, up_to=SMALL)) -> Path:
    """Return ``checkpoint`` if ``check`` finds nothing; by default it reads the small files only, before anybody believes them.

    Raises:
        CheckpointError: if it finds something.
    """
    if problems := check(checkpoint):
        raise CheckpointError("the checkpoint is damaged and was not opened", where=checkpoint, value=problems[:5],
                              remedy="name an older checkpoint of the run, or resume the run: it falls back by itself")
    return checkpoint


class CheckpointWeights(WeightsReader):
    """The fp32 weights of a committed checkpoint, verified first. A tied name reads the tensor it is tied to."""

    def __init__(self, checkpoint: Path, *, check: Check = verify) -> None:
        self._reader = FragmentReader(checked(checkpoint, check))
        self._tied: dict[str, str] = json.loads((checkpoint / layout.STATE).read_text())["tied"]

    def names(self) -> list[str]:
        return [*self._reader.shapes, *self._tied]

    def home(self, name: str) -> str:
        return self._tied.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shapes[self.home(name)]

    def read_slice(self, name: str, *, start: int, numel: int) -> Tensor:
        home = self.home(name)
        return self._reader.read(home, "weight", start=start, out=torch.empty(numel, dtype=self._reader.dtype(home)))


class FolderWeights(WeightsReader):
    """The safetensors of a transformers folder, one file or several."""

    def __init__(self, folder: Path) -> None:
        self._files = ExitStack()
        try:
            if (folder / INDEX).is_file():
                where: dict[str, str] = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            elif (folder / SINGLE).is_file():
                with safe_open(folder / SINGLE, framework="pt") as file:
                    where = dict.fromkeys(file.keys(), SINGLE)
            else:
                raise CheckpointError("no safetensors weights here", where=folder, value=sorted(p.name for p in folder.glob("*"))[:10],
                                      remedy="save the model with transformers' save_pretrained; pickled weights (.bin) are not opened")
            opened = {name: self._files.enter_context(safe_open(folder / name, framework="pt")) for name in sorted(set(where.values()))}
            self._tensors: dict[str, Any] = {tensor: opened[file] for tensor, file in where.items()}
            for name in where:
                self.shape(name)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError("a file of the weights is missing or damaged", where=folder, value=str(error).splitlines()[0],
                                  remedy="copy the folder again, whole") from error

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].get_slice(name).get_shape())

    def read_slice(self, name: str, *, start: int, numel: int) -> Tensor:
        shape = self.shape(name)
        if not shape:
            return self._tensors[name].get_tensor(name).view(-1)[start:start + numel]
        row = torch.Size(shape[1:]).numel()  # safetensors slices by rows: read those that cover the range
        first, last = start // row, -(-(start + numel) // row)
        return self._tensors[name].get_slice(name)[first:last].reshape(-1)[start - first * row:][:numel]
