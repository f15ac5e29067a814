"""A scratch copy of all that a run needs: data, tokenizer, config, the scripts of its site. A
mistake is made in it, and it is thrown away.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.cli import ROOT

Values = dict[str, dict[str, Any]]


@dataclass
class Place:
    """The folder of one mistake; ``values`` become its config.yaml."""

    folder: Path
    rng: random.Random
    values: Values
    text: str = ""  # of the config, where it is not the YAML of ``values``
    overrides: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def train(self) -> Path:
        return self.folder / "shards" / "train"

    @property
    def site(self) -> Path:
        return self.folder / "slurm" / "site.sh"

    @property
    def script(self) -> Path:
        return self.folder / "slurm" / "train.sbatch"

    def shard(self, suffix: str) -> Path:
        """Return one of the files of the training shards, by chance."""
        return self.rng.choice(sorted(self.train.glob(f"*{suffix}")))

    def write(self) -> Path:
        """Return the config, written."""
        file = self.folder / "config.yaml"
        file.write_text(self.text or yaml.safe_dump(self.values))
        return file

    def replace(self, file: Path, old: str, new: str) -> None:
        """Change a script."""
        text = file.read_text()
        assert old in text, f"{file.name} has no {old!r}"
        file.write_text(text.replace(old, new))

    def add(self, line: str) -> None:
        """Add a line to site.sh."""
        self.site.write_text(f"{self.site.read_text()}\n{line}\n")


@dataclass(frozen=True)
class Mistake:
    """``make`` makes it; one of the ``words`` must be in what is said, or the wrong place was
    named.
    """

    name: str
    make: Callable[[Place], object]
    words: Sequence[str]
    examples: bool = False  # of a fine-tuning


def new_place(folder: Path, source: Path, *, seed: int, examples: bool) -> Place:
    """Return a place without any mistake, from the data in ``source``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("tokenizer", "shards", "encoder"):
        shutil.copytree(source / name, folder / name)
    shutil.copy(source / "reviews.jsonl", folder)
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    values = _tuning(folder) if examples else _pretraining(folder)
    values["cluster"] = {
        "nodes": 2,
        "partition": "normal",
        "time": "30",
        "signal_s": 60,
        "scripts": str(folder),
        "sbatch": {"ntasks-per-node": 1, "oversubscribe": True, "mem": 900},
    }
    return Place(folder, random.Random(seed), values)


def _pretraining(folder: Path) -> Values:
    return {
        "run": {"name": "mine", "root": str(folder / "runs")},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {
            "seq_len": 32,
            "sources": [{"name": "text", "shards": str(folder / "shards/train")}],
            "validation": {"shards": str(folder / "shards/validation"), "every_steps": 50},
        },
        "model": {
            "architecture": "llama",
            "config": {
                "num_hidden_layers": 4,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            },
        },
        "objective": {"name": "clm"},
        "optim": {"lr": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 20},
        "train": {"steps": 200, "global_batch": 16, "micro_batch": 4},
        "engine": {"zero_stage": 1, "precision": "fp32"},
    }


def _tuning(folder: Path) -> Values:
    return {
        "run": {"name": "tuned", "root": str(folder / "runs")},
        "model": {"pretrained": str(folder / "encoder")},
        "task": {"name": "sequence_classification"},
        "data": {
            "train": str(folder / "reviews.jsonl"),
            "validation": 0.1,
            "max_length": 32,
            "cache": str(folder / "cache"),
        },
        "optim": {"lr": 1e-3},
        "train": {"epochs": 3, "global_batch": 16, "micro_batch": 4},
        "engine": {"zero_stage": 1, "precision": "fp32"},
    }
