"""Readers of one corpus, each as its own documentation has it, in a process of its own: what
`benchmarks/stream.py` measures ours against.

    # answers one JSON line on stdout to each on stdin
    python benchmarks/peers/streams.py FOLDER PEER

A reader is a generator of batches of 32 x 1024 int64, over ``epochs`` epochs from batch ``start``
on; what it needs on disk it makes of ``FOLDER/flat.bin`` (uint16) when it is first asked. Peers
that need seconds for it get the first tenth of the corpus. Libraries that pin old versions of
others are imported here only, by the interpreter of an environment of their own. This file needs
numpy alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BATCH, SEQ = 32, 1024
TOKENS = BATCH * SEQ  # of a batch
DOCUMENT = 600  # tokens on average

Batches = Iterator[np.ndarray]


class Reader(NamedTuple):
    """``batches(folder, state, epochs)``: from batch 0 where the state is 0; ``state(folder,
    batch)``: what a checkpoint would hold.
    """

    batches: Callable[[Path, Any, int], Batches]
    state: Callable[[Path, int], Any] = lambda folder, batch: batch
    share: float = 1.0  # of the corpus


def tokens_of(folder: Path, share: float = 1.0) -> np.ndarray:
    """Return the corpus, or its first part."""
    tokens = np.memmap(folder / "flat.bin", np.uint16, "r")
    return tokens[: int(share * len(tokens))]


def documents(folder: Path, share: float) -> list[np.ndarray]:
    """Return the documents of the corpus, or of its first part."""
    tokens = tokens_of(folder, share)
    ends = np.load(folder / "ends.npy")
    return np.split(tokens, ends[ends < len(tokens)])


def pack(parts: Iterable[np.ndarray]) -> Batches:
    """Yield batches of the parts laid end to end."""
    held: list[np.ndarray] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= TOKENS:
            flat = np.concatenate(held) if len(held) > 1 else held[0]
            for first in range(0, size - TOKENS + 1, TOKENS):
                yield flat[first : first + TOKENS].reshape(BATCH, SEQ).astype(np.int64)
            held = [flat[size // TOKENS * TOKENS :]]
            size = len(held[0])


def made(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return ``folder/name``, made unless it is there."""
    path = folder / name
    if not path.exists():
        make(path.with_name(f"{name}.partial"))
        path.with_name(f"{name}.partial").rename(path)
    return path


# ---------------------------------------------------------------------------------------- np.memmap
def memmap(folder: Path, start: int, epochs: int) -> Batches:
    """Into one preallocated batch, in order: the fastest that the few lines do that everybody
    writes.
    """
    tokens, batch = tokens_of(folder), np.empty((BATCH, SEQ), np.int64)
    for _ in range(epochs):
        for first in range(start * TOKENS, len(tokens) - TOKENS + 1, TOKENS):
            batch[:] = tokens[first : first + TOKENS].reshape(BATCH, SEQ)
            yield batch


# --------------------------------------------------------------------------------------- webdataset
def webdataset_shards(folder: Path, start: int, epochs: int) -> Batches:
    """The stock pipeline over our own shards: a sample is a chunk. There is no state: a resume
    replays.
    """
    import webdataset

    urls = sorted(map(str, (folder / "shards").glob("*.tar")))
    for _ in range(epochs):
        chunks = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        yield from islice(
            pack(np.frombuffer(chunk["tokens.bin"], "<u2") for chunk in chunks), start, None
        )


def webdataset_documents(folder: Path, start: int, epochs: int) -> Batches:
    """The usual layout: one .npy a document."""
    import webdataset

    def make(path: Path) -> None:
        path.mkdir(exist_ok=True)
        with webdataset.ShardWriter(
            str(path / "%06d.tar"), maxsize=64e6, maxcount=10**9, verbose=0
        ) as writer:
            for k, document in enumerate(documents(folder, 0.1)):
                writer.write({"__key__": f"{k:09d}", "npy": np.asarray(document)})

    urls = sorted(map(str, made(folder, "npy", make).glob("*.tar")))
    for _ in range(epochs):
        samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
        yield from islice(pack(sample["npy"] for sample in samples), start, None)


# ------------------------------------------------------------------------------- MosaicML Streaming
def mosaicml(folder: Path, state: Any, epochs: int) -> Batches:
    """The iterator over packed rows, with its own state."""
    import torch

    library = torch.library.Library(
        "torchvision", "DEF"
    )  # it imports torchvision, whose kernels are not there beside a CPU-only torch
    for kernel in ("nms", "qnms"):
        library.define(f"{kernel}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    def make(path: Path) -> None:
        rows = tokens_of(folder, 0.1)
        with MDSWriter(out=str(path), columns={"ids": f"ndarray:uint16:{SEQ}"}) as writer:
            for first in range(0, len(rows) - SEQ + 1, SEQ):
                writer.write({"ids": np.asarray(rows[first : first + SEQ])})

    path = made(folder, "mds", make)
    clean_stale_shared_memory()
    dataset = StreamingDataset(
        local=str(path), batch_size=BATCH, shuffle=False, num_canonical_nodes=1
    )
    if state:
        dataset.load_state_dict(
            {
                "epoch": 0,
                "sample_in_epoch": state * BATCH,
                "num_canonical_nodes": 1,
                "shuffle_seed": 9176,
                "initial_physical_nodes": 1,
            }
        )
    samples = chain.from_iterable(dataset for _ in range(epochs))
    while rows := [sample["ids"] for sample in islice(samples, BATCH)]:
        yield np.stack(rows).astype(np.int64)


# -------------------------------------------------------------------------------------- HF datasets
def hf_rows(folder: Path) -> Any:
    """Return packed rows as an arrow data set on disk."""
    import datasets
    import pyarrow

    def make(path: Path) -> None:
        flat = np.asarray(tokens_of(folder))
        ids = pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(flat[: len(flat) // SEQ * SEQ]), SEQ
        )
        datasets.Dataset(pyarrow.table({"ids": ids})).save_to_disk(str(path), max_shard_size="64MB")

    datasets.disable_progress_bars()
    return datasets.load_from_disk(str(made(folder, "arrow", make))).with_format("numpy")


def hf_map(folder: Path, start: int, epochs: int) -> Batches:
    """Map style: slices of the memory-mapped table."""
    rows = hf_rows(folder)
    for _ in range(epochs):
        for first in range(start * BATCH, len(rows) - BATCH + 1, BATCH):
            yield rows[first : first + BATCH]["ids"].astype(np.int64)


def hf_stream(folder: Path, state: Any, epochs: int) -> Batches:
    """Streaming packed rows, with its own state."""
    rows = hf_rows(folder).to_iterable_dataset(num_shards=4)
    if state:
        rows.load_state_dict(state)
    for _ in range(epochs):
        for batch in rows.iter(BATCH):
            yield np.asarray(batch["ids"]).astype(np.int64)


def hf_stream_state(folder: Path, batch: int) -> Any:
    """Return its state after so many batches, which it finds by reading them."""
    rows = hf_rows(folder).to_iterable_dataset(num_shards=4)
    for _ in islice(rows.iter(BATCH), batch):
        pass
    return rows.state_dict()


def hf_documents(folder: Path, start: int, epochs: int) -> Batches:
    """Streaming documents, packed by hand; a resume replays the documents (`skip`)."""
    import datasets
    import pyarrow

    def make(path: Path) -> None:
        ids = pyarrow.array([np.asarray(document) for document in documents(folder, 0.1)])
        datasets.Dataset(pyarrow.table({"ids": ids})).save_to_disk(str(path))

    datasets.disable_progress_bars()
    rows = (
        datasets.load_from_disk(str(made(folder, "arrow-documents", make)))
        .with_format("numpy")
        .to_iterable_dataset()
    )
    rows = rows.skip(start * TOKENS // DOCUMENT)
    for _ in range(epochs):
        yield from pack(row["ids"] for row in rows)


# ------------------------------------------------------------------------------------------ litdata
def litdata_tokens(folder: Path, state: Any, epochs: int) -> Batches:
    """The loader for tokens over the streaming data set, without worker processes, with its own
    state.
    """
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    def make(path: Path) -> None:
        parts = [
            (str(folder / "flat.bin"), first) for first in range(0, len(tokens_of(folder)), 2**22)
        ]
        optimize(
            litdata_part,
            parts,
            str(path),
            chunk_bytes="64MB",
            num_workers=1,
            item_loader=TokensLoader(block_size=SEQ),
            verbose=False,
        )

    path = made(folder, "litdata", make)
    loader = StreamingDataLoader(
        StreamingDataset(str(path), item_loader=TokensLoader(block_size=SEQ), shuffle=False),
        batch_size=BATCH,
        num_workers=0,
    )
    if state:
        loader.load_state_dict(state)
    for _ in range(epochs):
        for batch in loader:
            yield batch.numpy().astype(np.int64)


def litdata_part(part: tuple[str, int]) -> Iterator[Any]:
    """Yield the tokens of one part of the corpus as its writer wants them."""
    import torch

    path, first = part
    yield torch.from_numpy(np.memmap(path, np.uint16, "r")[first : first + 2**22].astype(np.int32))


def litdata_state(folder: Path, batch: int) -> Any:
    """Return its state after so many batches, which it finds by reading them."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(
        str(folder / "litdata"), item_loader=TokensLoader(block_size=SEQ), shuffle=False
    )
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
    for _ in islice(loader, batch):
        pass
    return loader.state_dict()


READERS = {
    "np.memmap": Reader(memmap),
    "webdataset, our shards": Reader(webdataset_shards),
    "webdataset, one .npy a document": Reader(webdataset_documents, share=0.1),
    "HF datasets, map-style": Reader(hf_map),
    "HF datasets, streaming rows": Reader(hf_stream, hf_stream_state),
    "HF datasets, streaming documents": Reader(hf_documents, share=0.1),
    "MosaicML Streaming": Reader(mosaicml, share=0.1),
    "litdata": Reader(litdata_tokens, litdata_state),
}
OWN_ENVIRONMENT = (
    "MosaicML Streaming",
    "litdata",
)  # pin versions of numpy, transformers and others


# -------------------------------------------------------------------------------------- the process
def anonymous_mib() -> float:
    """Return the memory of this process that no file backs: mapped pages of the page cache are not
    in it.
    """
    return (
        int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
    )  # type: ignore[union-attr]


def measure_epochs(reader: Reader, folder: Path) -> dict[str, Any]:
    """Return M tokens/s of two epochs of one reader, opening included, and its anonymous memory
    (MiB) through the second.
    """
    count = (
        int(reader.share * len(tokens_of(folder))) // TOKENS - 8
    )  # no reader gives the last row of each of its files
    began = time.perf_counter()
    batches, speeds, memory = reader.batches(folder, 0, 2), [], []
    for epoch in range(2):
        for k, _ in enumerate(islice(batches, count), 1):
            if epoch and k % (count // 5) == 0:
                memory.append(anonymous_mib())
        assert k == count, f"{k} batches of {count}"
        ended = time.perf_counter()
        speeds.append(count * TOKENS / (ended - began) / 1e6)
        began = ended
    return {"speeds": speeds, "memory": memory}


def measure_resume(reader: Reader, folder: Path, place: float) -> dict[str, Any]:
    """Return the position in tokens, and the seconds from nothing but a state to the first batch
    there.
    """
    batch = int(place * (int(reader.share * len(tokens_of(folder))) // TOKENS - 8))
    state = reader.state(folder, batch)
    began = time.perf_counter()
    batches = reader.batches(
        folder, state, 1
    )  # held, so that it does not end within the measurement
    next(batches)
    return {"tokens": batch * TOKENS, "seconds": time.perf_counter() - began}


def serve(reader: Reader, folder: Path) -> None:
    """Answer ``"epochs"`` and places of a resume (in epochs), one JSON line each, until stdin
    ends.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    for line in sys.stdin:
        asked = json.loads(line)
        answer = (
            measure_epochs(reader, folder)
            if asked == "epochs"
            else measure_resume(reader, folder, asked)
        )
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    serve(READERS[sys.argv[2]], Path(sys.argv[1]))
