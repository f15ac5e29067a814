"""A small labelled table and a tiny pretrained encoder: what a fine-tuning starts from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

GOOD, BAD = ["good", "lovely", "great", "fine"], ["bad", "awful", "dull", "poor"]
THINGS, REST = (
    ["film", "book", "song", "play"],
    ["it", "was", "a", "very", "the", "and", "but", "I", "saw", "heard"],
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Return a BERT-like tokenizer with one id a word."""
    vocabulary = {
        word: number for number, word in enumerate([*SPECIAL, *GOOD, *BAD, *THINGS, *REST])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def make_encoder(folder: Path) -> Path:
    """Return ``folder`` with a tiny BERT without a head, and its tokenizer, as transformers saves
    them.
    """
    tokenizer = words_tokenizer()
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reviews(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows with a ``text`` of 3 to 27 words and its ``label``."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        label, words = ("good", GOOD) if rng.random() < 0.6 else ("bad", BAD)
        said = [
            *rng.choices(REST, k=rng.randint(1, 20)),
            *rng.choices(words, k=rng.randint(1, 6)),
            rng.choice(THINGS),
        ]
        rows.append(
            {"id": f"r{number}", "text": " ".join(rng.sample(said, len(said))), "label": label}
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def task_values(folder: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a small fine-tuning in ``folder``, which holds ``encoder/`` and
    ``reviews.jsonl``; ``sections`` lie on top.
    """
    values: dict[str, dict[str, Any]] = {
        "run": {"name": name, "root": str(folder / "runs"), "seed": 3},
        "data": {
            "train": str(folder / "reviews.jsonl"),
            "validation": 0.2,
            "max_length": 32,
            "cache": str(folder / "cache"),
        },
        "model": {"pretrained": str(folder / "encoder")},
        "task": {"name": "sequence_classification"},
        "optim": {"lr": 3e-3},
        "schedule": {"name": "linear", "warmup_steps": 2, "min_ratio": 0.0},
        "train": {"steps": 6, "global_batch": 16, "micro_batch": 4},
        "engine": {"zero_stage": 1, "precision": "fp32"},
        "checkpoint": {"every_minutes": None},
        "metrics": {"every_steps": 1, "tensorboard": False},
    }
    return {key: values.get(key, {}) | sections.get(key, {}) for key in {**values, **sections}}
