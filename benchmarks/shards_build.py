"""How fast text becomes shards, against `tokenizers` alone on the same text and the same cores.

    python -m benchmarks.shards_build [--mb 64] [--turns 5] [--vocab 32768]

The text is the Python source found on the machine, as files in one folder. "tokenizers alone" calls
encode_batch_fast on the texts in memory with its own threads on all cores, in batches, and throws
the result away. "shards build" is the whole of `hfscale shards build`: starting its processes,
reading, splitting, dropping duplicates, tokenizing, writing, syncing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from itertools import count
from pathlib import Path

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict
from hfscale.config.corpus import CorpusConfig, Split, TextSource
from hfscale.corpus.build import build_shards
from hfscale.corpus.source import open_corpus
from hfscale.corpus.split import assign
from hfscale.corpus.tokenizer_training import train_tokenizer
from hfscale.shards.counts import Counts
from hfscale.tokenizer import load_tokenizer

BATCH = 512  # documents a call: as large as helps it
PEER, OURS = "tokenizers alone", "shards build"


def make_text(folder: Path, size: int) -> list[str]:
    """Return the texts that were also written into ``folder``, about ``size`` bytes of them, no two
    alike.
    """
    texts: list[str] = []
    folder.mkdir()
    for document in assign(
        open_corpus(TextSource(path=os.path.dirname(os.__file__), pattern="**/*.py")).documents(),
        Split(),
        Counts(),
    ):
        (folder / f"{len(texts):06d}.py").write_bytes(document.text.encode())
        texts.append(document.text)
        size -= document.size
        if size < 0:
            break
    return texts


def options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=32768)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the section ``shards_build`` of RESULTS.md."""
    asked = options()
    about = machine("tokenizers", "webdataset")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = make_text(folder / "text", int(asked.mb * 1e6))
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        numbers = count()

        def config() -> CorpusConfig:
            return CorpusConfig.model_validate(
                {
                    "source": {"path": str(folder / "text")},
                    "shards": {"path": str(folder / f"shards-{next(numbers)}")},
                    "tokenizer": {
                        "path": str(folder / "tokenizer"),
                        "vocab_size": asked.vocab,
                        "max_documents": 1500,
                    },
                }
            )

        train_tokenizer(config())

        def peer() -> float:
            tokenizer = load_tokenizer(folder / "tokenizer").backend_tokenizer
            began = time.perf_counter()
            for start in range(0, len(texts), BATCH):
                tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
            return megabytes / (time.perf_counter() - began)

        def ours() -> float:
            settings = config()
            began = time.perf_counter()
            built = build_shards(settings)
            took = time.perf_counter() - began
            assert sum(manifest.documents for manifest in built.values()) == len(texts)
            shutil.rmtree(settings.shards.path)
            return megabytes / took

        speeds = interleaved({PEER: peer, OURS: ours}, repeats=asked.turns)
    share = ratio(speeds[OURS], speeds[PEER])
    rows = [
        [PEER, spread(speeds[PEER]), "1.00", ""],
        [OURS, spread(speeds[OURS]), f"{share:.2f}", verdict(share, at_least=0.8)],
    ]
    what = (
        f"{megabytes:.0f} MB of Python source in {len(texts):,} files, byte-level BPE of "
        f"{asked.vocab:,} tokens"
    )
    record(
        "shards_build",
        f"{about} {what}. MB of text a second, median (quartiles) of {asked.turns} turns.\n\n"
        + table(["", "MB/s", "ratio", "target"], rows),
    )


if __name__ == "__main__":
    main()
