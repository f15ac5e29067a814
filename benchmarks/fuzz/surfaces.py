"""Where foreign bytes come in, and what of the base each of these places needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fuzz import asked, data, runs
from benchmarks.fuzz.act import Act, Random, tokens_of, weights_of


@dataclass(frozen=True)
class Surface:
    """Where foreign bytes come in; ``reads`` gives the digest of what undamaged ones say."""

    bend: Callable[[Random, Path], Act]
    needs: tuple[str, ...]  # what of the base is copied
    share: int = 1
    reads: Callable[[Path], str] | None = None


def tokens(home: Path) -> str:
    """Return a digest of what the shards say."""
    return tokens_of(home / "shards" / "train")


def weights(home: Path) -> str:
    """Return a digest of what the newest checkpoint says."""
    return weights_of(runs.checkpoints_of(home)[-1])


DATA = ("run.yaml", "corpus.yaml", "tokenizer", "shards")
RUN = (*DATA, "runs")
SURFACES = {
    "configs": Surface(asked.on_yaml, (*DATA, "text"), 4),
    "overrides": Surface(asked.on_overrides, DATA, 3),
    "names": Surface(asked.on_names, (*RUN, "export", "rows.jsonl"), 3),
    "manifests of shards": Surface(data.on_manifest, DATA, 3),
    "indexes": Surface(data.on_index, DATA, 3),
    "bytes of shards": Surface(data.on_shard_bytes, DATA, 5, tokens),
    "checkpoints": Surface(runs.on_state, RUN, 4),
    "safetensors": Surface(runs.on_fragments, RUN, 2),
    "bytes of checkpoints": Surface(runs.on_checkpoint_bytes, RUN, 5, weights),
    "models": Surface(runs.on_export, (*DATA, "export"), 4),
    "records": Surface(runs.on_records, RUN, 3),
    "tars": Surface(data.on_tar, ("raw.tar", "export"), 3),
    "tables": Surface(data.on_table, ("rows.jsonl", "rows.csv", "export"), 3),
    "environment": Surface(asked.on_environment, DATA, 2),
}
