"""Mistakes in a config: keys that are none, values that cannot be, sections that contradict each
other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from benchmarks.mistakes.place import Mistake, Place


def put(key: str, value: Any) -> Callable[[Place], None]:
    """Return what sets a key of the config."""

    def make(place: Place) -> None:
        here: Any = place.values
        *sections, name = key.split(".")
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value

    return make


def misspelt(section: str) -> Callable[[Place], None]:
    """Return what swaps two letters of a key of a section, by chance."""

    def make(place: Place) -> None:
        values = place.values[section]
        name = place.rng.choice(sorted(name for name in values if len(set(name)) > 1))
        at = next(i for i in range(1, len(name)) if name[i - 1] != name[i])
        values[name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :]] = values.pop(name)

    return make


def moved(section: str, key: str, to: str) -> Callable[[Place], None]:
    """Return what puts a key into a section that has no such key."""

    def make(place: Place) -> None:
        place.values.setdefault(to, {})[key] = place.values[section].pop(key)

    return make


def more(lines: str) -> Callable[[Place], None]:
    """Return what adds lines to the text of the config."""

    def make(place: Place) -> None:
        place.text = yaml.safe_dump(place.values) + lines

    return make


def case(key: str, value: Any, *words: str) -> Mistake:
    """Return a wrong value of ``key``, which must be named where ``words`` are not."""
    return Mistake(f"{key}={value}", put(key, value), words or (key,))


KEYS = [
    *(
        Mistake(f"a letter swapped in {one}", misspelt(one), (f"{one}.",))
        for one in ("data", "optim", "train", "schedule", "engine", "cluster")
    ),
    Mistake("a section misspelt", lambda p: p.values.update(optm=p.values.pop("optim")), ("optm",)),
    Mistake("steps in optim", moved("train", "steps", "optim"), ("train.steps",)),
    Mistake("clip_norm in train", put("train.clip_norm", 1.0), ("optim.clip_norm",)),
    Mistake("no tokenizer", lambda p: p.values.pop("tokenizer"), ("tokenizer",)),
    Mistake("no objective", lambda p: p.values.pop("objective"), ("objective",)),
    Mistake("a key twice", more("run: {name: again}\n"), ("run is written twice",)),
    Mistake("a bracket left open", more("metrics: {every_steps: 5\n"), ("config.yaml:",)),
    Mistake("a tab", more("metrics:\n\tevery_steps: 5\n"), ("config.yaml:",)),
    Mistake("a base that is not there", more("extends: [base.yaml]\n"), ("base.yaml",)),
]
VALUES = [
    case("optim.lr", -1e-3),
    case("optim.lr", "fast"),
    case("optim.betas", [0.9, 1.5]),
    case("schedule.name", "cosin"),
    case("schedule.min_ratio", 2),
    case("train.global_batch", 18, "micro_batch"),
    case("train.global_batch", 20, "global_batch"),
    case("train.epochs", 3, "train.steps"),
    case("train.patience", 3),
    case("engine.zero_stage", 4),
    case("engine.precision", "fp8"),
    case("engine.extra", {"optimizer": {"type": "Adam"}}),
    case("engine.offload", "parameters", "offload"),
    case("model.architecture", "lama"),
    case("model.pretrained", "gpt2", "model.architecture"),
    case("model.config.hidden_size", 66, "hidden_size", "model"),
    case("model.config.n_head", 4, "n_head"),
    case("model.config.vocab_size", 100, "vocab_size"),
    case("data.seq_len", 1024, "max_position_embeddings"),
    case("data.lanes", -1),
    case("data.stages", [{"at": 0.5, "weights": {"code": 1.0}}]),
    case("checkpoint.keep_best", {"metric": "validation_bleu"}),
    case("model.freeze", ["embeding"]),
    case("model.lora", {"r": 8}),
    case("objective.name", "mlm", "mask"),
    case("objective.options", {"mask": 0.1}, "options"),
    case("run.name", "a/b"),
    case("optim.lr", 1e30, "not finite", "unhealthy"),
    case("schedule.warmup_steps", 5000),
]
MISTAKES = [*KEYS, *VALUES]
