"""How well an epoch is mixed: stock webdataset's shardshuffle + shuffle(1000) and our order, on the
same synthetic corpus.

    python -m benchmarks.shuffle [--shards 64] [--rows 4000]

Every row knows its place in the corpus. Both readers really run over real tars, one epoch, and are
cut into the same global batches. Writes the table into docs/data.md, and the picture
docs/shuffle.png. About half a minute.
"""

from __future__ import annotations

import argparse
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import webdataset

from benchmarks.common import record, table
from hfscale.dist.world import Place
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.writer import ShardWriter
from hfscale.stream.loader import Stream
from hfscale.stream.rows import TokenRows
from tests.helpers.orders import order_of

SEQ, BATCH, BUFFER, PARTS = 8, 512, 1000, 1000
PLACES = f"1/{PARTS}ths of the corpus a batch"
DOCS = Path(__file__).parents[1] / "docs"

INTRO = f"""
One epoch of {{shards}} shards of {{rows:,}} rows, in global batches of {BATCH}: by stock
`webdataset` {webdataset.__version__}, with `shardshuffle` over all shards and `.shuffle({BUFFER})`
on each rank, which has its share of the tars; and by ours with the defaults. A batch of ours mixes
at least {{ratio:.1f}} times as many shards and places. Printed by `python -m benchmarks.shuffle`.

![Where in the corpus the rows of sixty batches stand](shuffle.png)
"""
OUTRO = """
Batches of ours differ less from each other than chance would have it, because every batch takes as
many rows from each lane. Two rows of one lane are less than a block apart; that inside a block
every order is as likely as any other is shown by `tests/stream/test_order.py`. For distances and
correlations the rows of a batch are taken in random order: training does not see the one they have.
"""


def write(folder: Path, *, shards: int, rows: int) -> list[str]:
    """Return the names of webdataset's tars, one sample a row; ``folder`` gets our shards too. Row
    k says k.
    """
    entries, tars = list[ShardEntry](), []
    writer = ShardWriter(
        folder,
        name="ours",
        dtype=np.dtype("<u2"),
        chunk_tokens=rows * SEQ + 1,
        shard_chunks=1,
        committed=entries.append,
    )
    for shard in range(shards):
        numbers = shard * rows + np.arange(rows)
        ids = np.repeat(numbers, SEQ)
        ids[0::SEQ], ids[1::SEQ] = numbers // 1000, numbers % 1000
        writer.add(np.append(ids % 2**16, 0).astype("<u2"))
        tars.append(str(folder / f"stock-{shard:04d}.tar"))
        with webdataset.TarWriter(tars[-1]) as tar:
            for number in numbers.tolist():
                tar.write({"__key__": f"{number:09d}", "bin": struct.pack("<q", number)})
    writer.close()
    Manifest(
        dtype="uint16", tokenizer=TokenizerInfo("none", 2**16, 0), source={}, shards=tuple(entries)
    ).save(folder)
    return tars


def stock(tars: list[str], *, ranks: int) -> np.ndarray:
    """Return the corpus places in the order of webdataset's epoch. Each rank has its share of the
    tars, as ``split_by_node`` deals them.
    """
    readers: list[Iterator[dict[str, bytes]]] = []
    for rank in range(ranks):
        mine = webdataset.WebDataset(
            tars[rank::ranks], shardshuffle=len(tars), seed=rank, empty_check=False
        )
        readers.append(iter(mine.shuffle(BUFFER, rng=random.Random(rank))))
    share, batches = BATCH // ranks, []
    while (
        len(
            batch := [
                struct.unpack("<q", sample["bin"])[0]
                for reader in readers
                for _, sample in zip(range(share), reader)
            ]
        )
        == BATCH
    ):
        batches.append(batch)
    return np.array(batches)


def ours(folder: Path) -> np.ndarray:
    """Return the corpus places of our epoch, read from the ids of the batches."""
    rows = TokenRows(folder, seq_len=SEQ)
    order = order_of(rows.shard_rows, seed=1, lanes="auto", block=1024)
    stream, batches = (
        Stream(rows, order, global_batch=BATCH, micro_batch=BATCH, place=Place()),
        [],
    )
    for _ in range(order.rows // BATCH):
        [batch] = stream.take()
        batches.append(batch.ids_BL[:, 0].numpy() * 1000 + batch.ids_BL[:, 1].numpy())
        stream.advance()
    stream.close()
    return np.array(batches)


def ideal(rows: int) -> np.ndarray:
    """Return an epoch in a uniformly random order."""
    return np.random.default_rng(0).permutation(rows)[: rows // BATCH * BATCH].reshape(-1, BATCH)


def measures(batches: np.ndarray, *, rows: int, shards: int) -> dict[str, float]:
    """Return what is measured of one epoch (steps x BATCH corpus places)."""
    total, steps = rows * shards, len(batches)
    place = batches / total
    rng = np.random.default_rng(0)
    mixed = rng.permuted(
        place, axis=1
    )  # within a batch order means nothing: neighbours are two rows of it by chance
    line = mixed.ravel() - mixed.mean()
    halves = np.sort(batches, axis=1)
    return {
        "rows read": batches.size,
        "shards a batch": np.mean([len(set(batch)) for batch in (batches // rows).tolist()]),
        PLACES: np.mean([len(set(batch)) for batch in (batches * PARTS // total).tolist()]),
        "distance of two rows of a batch, share of the corpus": np.abs(
            np.diff(mixed, axis=1)
        ).mean(),
        "rows next to each other in corpus and batch, %": 100
        * (np.diff(halves, axis=1) == 1).sum()
        / batches.size,
        "autocorrelation of places, one row on": (line[1:] * line[:-1]).mean() / line.var(),
        "one batch on": (line[BATCH:] * line[:-BATCH]).mean() / line.var(),
        "spread of the batches' means, chance = 1": place.mean(axis=1).std()
        / (place.std() / np.sqrt(BATCH))
        if steps > 1
        else 0.0,
    }


def huge() -> str:
    """Return what a batch mixes where the data is a trillion tokens: by the order alone, no tar is
    that long.
    """
    shards, rows = 100_000, 9766
    order = order_of(np.full(shards, rows), seed=1, lanes="auto", block=1024)
    places = order.locate(order.rows // 2 // BATCH * BATCH + np.arange(200 * BATCH))
    found = measures(
        (places.shard * rows + places.row).reshape(-1, BATCH), rows=rows, shards=shards
    )
    mixed = f"{found['shards a batch']:.0f} shards and {found[PLACES]:.0f} of the 1/{PARTS}ths"
    return f"Of 1e12 tokens in {shards:,} shards a batch mixes {mixed}."


def draw(epochs: dict[str, np.ndarray], path: Path, *, total: int) -> None:
    """Draw where in the corpus the rows of 60 batches of the epoch stand: a batch is a column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(epochs), figsize=(3.1 * len(epochs), 3.2), sharey=True, layout="constrained"
    )
    for axis, (name, batches) in zip(axes, epochs.items(), strict=True):
        some = batches[:60]
        axis.scatter(
            np.repeat(np.arange(len(some)), BATCH // 4),
            some[:, ::4].ravel() / total,
            s=0.8,
            color="#20639b",
            linewidths=0,
        )
        axis.set(title=name, xlabel="batch", ylim=(0, 1), xlim=(-1, 60))
        axis.title.set_size(9)
    axes[0].set_ylabel("place in the corpus")
    figure.savefig(path, dpi=90)


def main() -> None:
    """Measure, print, draw, and write the section of docs/data.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4000)
    asked = parser.parse_args()
    total = asked.shards * asked.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tars = write(folder, shards=asked.shards, rows=asked.rows)
        readers: dict[str, Callable[[], np.ndarray]] = {
            "webdataset, 1 rank": lambda: stock(tars, ranks=1),
            "webdataset, 8 ranks": lambda: stock(tars, ranks=8),
            "ours, any ranks": lambda: ours(folder),
            "by chance": lambda: ideal(total),
        }
        epochs = {name: read() for name, read in readers.items()}
    found = {
        name: measures(batches, rows=asked.rows, shards=asked.shards)
        for name, batches in epochs.items()
    }
    lines = [
        [
            what,
            *(
                f"{measured[what]:,.0f}" if measured[what] > 5 else f"{measured[what]:.3f}"
                for measured in found.values()
            ),
        ]
        for what in next(iter(found.values()))
    ]
    draw({name: epochs[name] for name in list(epochs)[:3]}, DOCS / "shuffle.png", total=total)
    worst = min(
        found["ours, any ranks"][what]
        / max(found[f"webdataset, {ranks}"][what] for ranks in ("1 rank", "8 ranks"))
        for what in ("shards a batch", PLACES)
    )
    intro = INTRO.format(shards=asked.shards, rows=asked.rows, ratio=worst)
    record(
        "How well an epoch is mixed",
        f"{intro}\n{table(['', *epochs], lines)}\n{OUTRO}{huge()}",
        path=DOCS / "data.md",
    )


if __name__ == "__main__":
    main()
