"""Predictions per second beside `transformers.pipeline` on the same model and texts, and whether
the answers are the same. On the CPU.

    python -m benchmarks.predict [--texts 512] [--turns 5] [--threads 2]

Texts have 3 to 60 words. The pipeline gets them one by one, and in batches of 8 and 32 in the order
given; hfscale in batches of 32, by length. The models have two layers of width 128. Five minutes.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import pipeline
from transformers.utils.logging import set_verbosity_error

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict
from hfscale.config.schema import Model, Named
from hfscale.engine.inference import InferenceEngine
from hfscale.models.build import build_model, special_ids
from hfscale.objectives.base import Setting
from hfscale.tasks.table import load_task
from hfscale.training.predictor import predict
from tests.objectives.tokenizers import TEXTS, tokenizer

BATCHES = (1, 8, 32)
BERT = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
}
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.3}
LABELS = {"problem": "single_label_classification", "labels": ["no", "yes"]}
HOW = {"max_new_tokens": 16, "do_sample": False}
# task -> architecture, its config, options of the task, facts, arguments of the pipeline, its
# answer
TASKS: dict[str, dict[str, Any]] = {
    "text_generation": {
        "architecture": "gpt2",
        "config": GPT2,
        "options": {"generation": HOW},
        "pipeline": {**HOW, "return_full_text": False},
        "answer": lambda made: made[0]["generated_text"],
    },
    "fill_mask": {
        "architecture": "bert",
        "config": BERT,
        "answer": lambda made: [row["token"] for row in made],
    },
    "feature_extraction": {
        "architecture": "bert",
        "config": BERT,
        "answer": lambda made: len(made[0]),
    },
    "sequence_classification": {
        "architecture": "bert",
        "config": BERT,
        "facts": LABELS,
        "answer": lambda made: made["label"],
    },
}


def examples_of(count: int, *, masked: bool) -> list[str]:
    """Return texts of 3 to 60 words."""
    rng, words = random.Random(0), " ".join(TEXTS[:2]).split()
    texts = [rng.choices(words, k=rng.randint(3, 60)) for _ in range(count)]
    return [" ".join([*text[:2], "[MASK]", *text[2:]] if masked else text) for text in texts]


def candidates(
    name: str, how: dict[str, Any], texts: list[str]
) -> tuple[dict[str, Callable[[], float]], bool]:
    """Return what is measured (texts per second), and whether the answers are the same."""
    words = tokenizer("wordpiece" if how["architecture"] == "bert" else "bpe")
    setting = {"seq_len": 496, "tokenizer": words, "facts": how.get("facts", {})}
    named = Named(name=name, options=how.get("options", {}))
    task = load_task(named, Setting(**setting))
    wanted = Model(
        architecture=how["architecture"], config={**how["config"], **task.model_overrides()}
    )
    model = build_model(
        wanted,
        auto_model=task.auto_model,
        vocab_size=len(words),
        seq_len=496,
        seed=3,
        overrides=special_ids(words),
    ).eval()
    task = load_task(named, Setting(**setting, model_config=model.config))
    role = next(iter(task.columns))
    examples = [{"id": str(number), role: text} for number, text in enumerate(texts)]
    use = pipeline(task.pipeline, model=model, tokenizer=words, **how.get("pipeline", {}))
    made: dict[str, Any] = {}

    def timed(name: str, run: Callable[[], Any]) -> Callable[[], float]:
        def measure() -> float:
            began = time.perf_counter()
            made[name] = run()
            return len(texts) / (time.perf_counter() - began)

        return measure

    runs = {
        "hfscale": timed(
            "hfscale", lambda: predict(task, InferenceEngine(model), examples, batch=32)
        )
    }
    runs |= {
        f"pipeline, batch {size}": timed("pipeline", lambda size=size: use(texts, batch_size=size))
        for size in BATCHES
    }
    runs["hfscale"], runs["pipeline, batch 1"]()
    runs["hfscale"]()
    ours = [answer["prediction"] for answer in made["hfscale"]]
    if name == "fill_mask":
        ours = [[row["token"] for row in answer] for answer in ours]
    elif name == "feature_extraction":
        ours = [len(answer) for answer in ours]
    return runs, ours == [how["answer"](answer) for answer in made["pipeline"]]


def main() -> None:
    """Print and record the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--texts", type=int, default=512
    )  # what `hfscale predict` sorts by length at a time
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    set_verbosity_error()
    rows = []
    about = machine("torch", "transformers")
    for name, how in TASKS.items():
        runs, same = candidates(name, how, examples_of(given.texts, masked=name == "fill_mask"))
        taken = interleaved(runs, repeats=given.turns)
        best = min(ratio(taken["hfscale"], taken[f"pipeline, batch {size}"]) for size in BATCHES)
        rates = [spread(values) for values in taken.values()]
        rows.append(
            [name, *rates, f"{best:.2f}", verdict(best, at_least=1.0), "yes" if same else "NO"]
        )
    peers = [f"pipeline, batch {size}" for size in BATCHES]
    header = [
        "texts per second",
        "hfscale, batch 32",
        *peers,
        "ratio to the best",
        "",
        "same answers",
    ]
    said = (
        f"{about} {given.texts} texts of 3 to 60 words, {given.turns} turns, "
        f"{given.threads} threads."
    )
    record("predict", f"{said}\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
