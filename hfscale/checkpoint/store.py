"""Fragments on disk: one safetensors file a rank, with ranges of named tensors that any rank of any
run can read.

A file's keys say what they hold: ``transformer.wte.weight[0:1164].exp_avg`` is elements 0 to 1163
of the flattened parameter. The shapes of the whole tensors are in the file's metadata. Which rank
wrote a range means nothing to a reader.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfscale.checkpoint import layout
from hfscale.engine.fragments import Fragment
from hfscale.errors import CheckpointError
from hfscale.records import Count, Damaged, open_file, parse

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 8 * 2**20  # bytes hashed and written at a time
KEY = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]\.(?P<kind>\w+)")


def serialize(fragments: Sequence[Fragment]) -> Iterator[memoryview | bytes]:
    """Yield the bytes of a safetensors file with ``fragments``, whose tensors lie on the CPU;
    nothing is copied.
    """
    shapes = {fragment.name: list(fragment.shape) for fragment in fragments}
    tensors = {
        f"{fragment.name}[{fragment.start}:{fragment.start + fragment.numel}].{kind}": tensor
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    }
    return pack(
        {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()},
        tensors.values(),
        shapes=json.dumps(shapes),
    )


def pack(
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[Tensor],
    **metadata: str,
) -> Iterator[memoryview | bytes]:
    """Yield the bytes of a safetensors file with ``entries``: name -> (dtype, shape).

    ``tensors`` are their numbers in this order, whole or in pieces; each may be made when its turn
    comes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, (dtype, shape) in entries.items():
        stop = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors:
        raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(raw), CHUNK):
            yield raw[start : start + CHUNK]


class Part(Protocol):
    """A tensor in a file; numbers are read where they are asked for."""

    def get_shape(self) -> list[int]: ...
    def __getitem__(self, part: slice) -> Tensor: ...


class TensorFile(Protocol):
    """A safetensors file that is open (a context, as ``safe_open``, which has no types)."""

    def keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_slice(self, name: str) -> Part: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def __enter__(self) -> TensorFile: ...
    def __exit__(self, *error: object) -> None: ...


class FragmentReader:
    """Tensors of a checkpoint by name and range, put together from whichever files hold them.
    Verify the checkpoint first.

    Memory: what is asked for, and nothing else; files are mapped, not read.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._files = ExitStack()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[
            tuple[str, str], list[tuple[int, int, TensorFile, str]]
        ] = {}  # (name, kind) -> (start, stop, file, key)
        for path in sorted((checkpoint / layout.ENGINE).glob("rank-*.safetensors")):
            file = self._files.enter_context(_fragments_in(path))
            shapes = _shapes(file, path)
            self.shapes |= shapes
            for key in file.keys():  # noqa: SIM118  (not a dict)
                match = KEY.fullmatch(key)
                start, stop = (int(match["start"]), int(match["stop"])) if match else (0, -1)
                whole = math.prod(shapes.get(match["name"], (0,))) if match else 0
                if (
                    not match
                    or not start <= stop <= whole
                    or file.get_slice(key).get_shape() != [stop - start]
                ):
                    raise _damaged(path, f"{key} is no range of one of its tensors")
                self._ranges.setdefault((match["name"], match["kind"]), []).append(
                    (start, stop, file, key)
                )
        for places in self._ranges.values():
            places.sort(key=lambda place: place[:2])

    def kinds(self, name: str) -> set[str]:
        """Return which tensors are there for a parameter: "weight", and its moments if it was
        trained.
        """
        return {kind for have, kind in self._ranges if have == name}

    def read(self, name: str, kind: str, *, start: int, out: Tensor) -> Tensor:
        """Return ``out`` (1-D), filled with the elements of the flattened tensor from ``start`` on.

        Raises:
            CheckpointError: if the files do not cover the range.
        """
        stop, filled = start + out.numel(), start
        for first, last, file, key in self._ranges.get((name, kind), []):
            lo, hi = max(first, filled), min(last, stop)
            if lo == filled and lo < hi:
                out[lo - start : hi - start].copy_(file.get_slice(key)[lo - first : hi - first])
                filled = hi
        if filled != stop:
            raise CheckpointError(
                "the checkpoint does not hold a whole tensor",
                where=name,
                value=f"{kind}: {filled} of {start}:{stop}",
                remedy="this is a defect; `hfscale checkpoints RUN --verify` shows whether "
                "files changed",
            )
        return out

    def dtype(self, name: str) -> torch.dtype:
        _, _, file, key = self._ranges[name, "weight"][0]
        nothing: torch.Tensor = file.get_slice(key)[:0]
        return nothing.dtype

    def close(self) -> None:
        self._files.close()


def tensors_in(path: Path) -> TensorFile:
    """Return a safetensors file, opened (a context, as ``safe_open``), if it is a regular file: a
    pipe would never answer.

    Raises:
        OSError, SafetensorError: if it cannot be opened, or its header does not fit it.
    """
    open_file(path).close()
    return cast(TensorFile, safe_open(path, framework="pt"))


def _fragments_in(path: Path) -> TensorFile:
    try:
        return tensors_in(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None


def _shapes(file: TensorFile, path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the whole tensors of which ``file`` has parts."""
    try:
        return parse(dict[str, tuple[Count, ...]], (file.metadata() or {}).get("shapes", ""))
    except Damaged as error:
        raise _damaged(path, f"metadata, shapes: {error}") from None


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"a file of the checkpoint is damaged: {what}",
        where=path,
        remedy="name an older checkpoint of the run; `hfscale checkpoints RUN --verify` lists "
        "what is wrong",
    )


def load_fragments(reader: FragmentReader, fragments: Sequence[Fragment]) -> None:
    """Fill the live views ``fragments`` from a checkpoint of any world size and stage.

    Raises:
        CheckpointError: before anything is changed, if the checkpoint is one of another model.
    """
    wrong = []
    for fragment in fragments:
        have = reader.shapes.get(fragment.name)
        if have != fragment.shape:
            wrong.append(
                f"{fragment.name}: {list(fragment.shape)}, in the checkpoint "
                f"{'missing' if have is None else list(have)}"
            )
        elif missing := set(fragment.tensors) - reader.kinds(fragment.name):
            wrong.append(f"{fragment.name}: no {' and '.join(sorted(missing))} in the checkpoint")
    if wrong:
        raise CheckpointError(
            f"the checkpoint is one of another model: {len(wrong)} tensors differ",
            where="checkpoints",
            value=wrong[:5],
            remedy="use the model section the run was started with, or another run.name",
        )
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            reader.read(fragment.name, kind, start=fragment.start, out=tensor)
