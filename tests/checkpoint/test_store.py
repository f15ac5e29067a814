"""Ranges of tensors on disk, read back under every other cut."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hfscale.checkpoint.manifest import write_file
from hfscale.checkpoint.store import FragmentReader, load_fragments, serialize
from hfscale.dist.world import Place
from hfscale.engine.fragments import Fragment, share
from hfscale.errors import CheckpointError

SHAPES = {"a.weight": (7, 5), "a[0:3].odd name": (11,), "b": (), "c": (1,), "d.bias": (64,)}


def whole(seed: int = 0, *, trained: bool = True) -> list[Fragment]:
    rng = torch.Generator().manual_seed(seed)
    kinds = ("weight", "exp_avg", "exp_avg_sq") if trained else ("weight",)
    return [
        Fragment(
            name,
            shape,
            0,
            {kind: torch.randn(torch.Size(shape).numel(), generator=rng) for kind in kinds},
        )
        for name, shape in SHAPES.items()
    ]


def save(folder: Path, fragments: list[Fragment], *, world_size: int) -> FragmentReader:
    for old in folder.glob("engine/*"):
        old.unlink()
    for rank in range(world_size):
        write_file(
            folder,
            f"engine/rank-{rank:05}.safetensors",
            serialize(list(share(fragments, place=Place(rank, world_size)))),
        )
    return FragmentReader(folder)


@settings(max_examples=30, deadline=None)
@given(writers=st.integers(1, 9), readers=st.integers(1, 9))
def test_any_cut_reads_what_any_other_cut_wrote(tmp_path_factory, writers, readers):
    saved, empty = whole(), whole(seed=1)
    reader = save(tmp_path_factory.mktemp("cut"), saved, world_size=writers)
    parts = [list(share(empty, place=Place(rank, readers))) for rank in range(readers)]
    sizes = [sum(fragment.numel for fragment in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for part in parts:
        load_fragments(reader, part)
    for got, want in zip(empty, saved, strict=True):
        assert all(torch.equal(got.tensors[kind], want.tensors[kind]) for kind in want.tensors)


def test_files_are_ordinary_safetensors_of_any_dtype(tmp_path):
    dtypes = (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    tensors = {str(dtype): (torch.arange(5) % 2).to(dtype) for dtype in dtypes}
    reader = save(
        tmp_path,
        [Fragment(name, (5,), 0, {"weight": tensor}) for name, tensor in tensors.items()],
        world_size=1,
    )
    stored = load_file(tmp_path / "engine/rank-00000.safetensors")
    for name, tensor in tensors.items():
        assert (
            torch.equal(stored[f"{name}[0:5].weight"], tensor)
            and reader.dtype(name) == tensor.dtype
        )
        assert torch.equal(
            reader.read(name, "weight", start=1, out=torch.empty(3, dtype=tensor.dtype)),
            tensor[1:4],
        )


def test_a_hole_is_an_error(tmp_path):
    save(tmp_path, whole(), world_size=4)
    (tmp_path / "engine/rank-00002.safetensors").unlink()  # the middle of d.bias
    with pytest.raises(CheckpointError, match="whole tensor"):
        load_fragments(FragmentReader(tmp_path), whole(seed=1))


def test_nothing_is_loaded_from_another_model(tmp_path):
    reader = save(tmp_path, whole(trained=False), world_size=2)
    target = whole(seed=1)
    before = target[0].tensors["weight"].clone()
    with pytest.raises(CheckpointError, match="no exp_avg and exp_avg_sq"):
        load_fragments(reader, target)
    with pytest.raises(CheckpointError, match="missing"):
        load_fragments(reader, [Fragment("new", (3,), 0, {"weight": torch.zeros(3)})])
    with pytest.raises(CheckpointError, match=r"in the checkpoint \[64\]"):
        load_fragments(reader, [Fragment("d.bias", (63,), 0, {"weight": torch.zeros(63)})])
    assert torch.equal(before, target[0].tensors["weight"])
