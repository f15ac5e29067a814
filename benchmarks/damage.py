"""What readers make of damaged shards: stock webdataset's stream, our reader and ``hfscale shards
verify`` on the same files.

Prints the table and puts it into ``docs/data.md``. Takes seconds: ``python -m benchmarks.damage``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import webdataset
from webdataset.handlers import reraise_exception

from benchmarks.common import record, table
from hfscale.errors import DataError
from hfscale.shards.manifest import Manifest
from hfscale.shards.reader import ShardReader
from hfscale.shards.verify import verify
from hfscale.stream.rows import TokenRows
from tests.helpers.damage import CHUNKS, KINDS, SHARDS, write_shards

SEQ = 16
INTRO = f"""
Each of these was done to the third chunk of the second of {SHARDS} shards of {CHUNKS} chunks, which
are samples to webdataset. Then all was read: by stock `webdataset` {webdataset.__version__} with
`handler=reraise_exception`, and by ours. "Skipped" is how many rows of {SEQ} tokens `data.on_error:
skip` masks. Printed by `python -m benchmarks.damage`.
"""


def stock(manifest: Manifest, good: list[bytes]) -> str:
    """Return what webdataset's own reader makes of the tars: an error, or how many samples it gives
    and whether they are right.
    """
    tars, found = [str(manifest.folder / entry.name) for entry in manifest.shards], []
    try:
        for sample in webdataset.WebDataset(
            tars, shardshuffle=False, empty_check=False, handler=reraise_exception
        ):
            found += [sample["tokens.bin"]] if "tokens.bin" in sample else []
    except Exception as error:
        return f"{type(error).__name__} after {len(found)} samples"
    missing, wrong = len(good) - len(found), len(set(found) - set(good))
    says = [f"{missing} of {len(good)} samples lost"] * bool(missing) + [f"{wrong} wrong"] * bool(
        wrong
    )
    return f"**{', '.join(says)}, no error**" if says else "all right"


def ours(manifest: Manifest) -> str:
    """Return the error of our reader."""
    try:
        for entry in manifest.shards:
            ShardReader(manifest.folder, entry, dtype=manifest.numpy_dtype).read_tokens(
                0, entry.tokens, np.empty(entry.tokens, np.int64)
            )
    except DataError as error:
        return error.what
    return "all right"


def skipped(folder: Path) -> str:
    """Return how many rows are masked, of how many."""
    rows = TokenRows(folder, seq_len=SEQ, skip=True)
    n = rows.shard_rows
    valid = rows.fill(
        np.repeat(np.arange(len(n)), n),
        np.concatenate([np.arange(k) for k in n]),
        np.empty((n.sum(), SEQ + 1), np.int64),
    )
    return f"{(~valid).sum()} of {len(valid)}"


def main() -> None:
    """Measure and record."""
    lines = []
    with tempfile.TemporaryDirectory() as top:
        whole = write_shards(Path(top) / "whole")
        tars = [str(whole.folder / entry.name) for entry in whole.shards]
        good = [
            sample["tokens.bin"]
            for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
        ]
        for kind, damage in KINDS.items():
            folder = Path(top) / kind.replace(" ", "-")
            write_shards(folder)
            damage.do(folder)
            manifest = Manifest.load(folder)
            finding = verify(manifest, threads=2)[-1].replace(f"{folder}/", "")
            lines.append([kind, stock(manifest, good), ours(manifest), finding, skipped(folder)])
    header = [
        "damage",
        "stock webdataset",
        "our reader",
        "`shards verify`, its last finding",
        "skipped",
    ]
    page = Path(__file__).parents[1] / "docs" / "data.md"
    record("What readers make of damage", INTRO + "\n" + table(header, lines), path=page)


if __name__ == "__main__":
    main()
