"""A small real corpus: some of Python's own source, its tokenizer and shards, made with the
commands a user types.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import Any

from tests.helpers.cli import hfscale

DOCUMENTS = 60
CORPUS = """
source: {format: text, path: text, pattern: "*.py"}
split: {validation: 0.1}
tokenizer: {path: tokenizer, kind: bpe, vocab_size: 512}
shards: {path: shards, shard_mb: 0.25, chunk_mb: 0.0625}
"""
GPT2 = {
    "architecture": "gpt2",
    "config": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
}
LLAMA = {
    "architecture": "llama",
    "config": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
}


def make_corpus(folder: Path) -> Path:
    """Return ``folder``, with ``tokenizer/`` and ``shards/{train,validation}/`` in it."""
    (folder / "text").mkdir(parents=True)
    files = sorted(
        Path(sysconfig.get_path("stdlib")).glob("*.py"),
        key=lambda file: (file.stat().st_size, file.name),
    )
    for file in files[-DOCUMENTS - 20 : -20]:  # of middling size
        shutil.copy(file, folder / "text")
    (folder / "corpus.yaml").write_text(CORPUS)
    hfscale("tokenizer", "train", "corpus.yaml", cwd=folder)
    hfscale("shards", "build", "corpus.yaml", cwd=folder)
    return folder


def run_values(corpus: Path, root: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a small run's config; ``sections`` are laid on top, key by key."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": name, "root": str(root), "seed": 3},
        "tokenizer": {"path": str(corpus / "tokenizer")},
        "data": {"seq_len": 32, "sources": [{"shards": str(corpus / "shards" / "train")}]},
        "model": GPT2,
        "objective": {"name": "clm"},
        "optim": {"lr": 1e-2},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "train": {"steps": 6, "global_batch": 16, "micro_batch": 4},
        "engine": {"zero_stage": 1, "precision": "fp32"},
        "checkpoint": {"every_minutes": None},
        "metrics": {"every_steps": 1, "tensorboard": False},
    }
    return {key: values.get(key, {}) | sections.get(key, {}) for key in {**values, **sections}}
