"""Does each objective learn what there is to learn? On made-up languages, where that is known.

    python -m benchmarks.learn [clm mlm contrastive seq2seq] [--folder FOLDER] [--png PNG]

Each language is written as shards, trained on with `hfscale pretrain` on two CPU ranks, and
measured on text that was held out:

- clm: a Markov chain. No model can get under its entropy; the loss shall come within 2 % of it.
- mlm: the same chain, 15 % of it hidden. The best loss is that of an oracle that knows the chain
  (forward-backward over the very masks that the model sees); the loss shall come within 5 % of it.
- contrastive: a document speaks of 8 of 64 concepts, each of which has 64 names. Two crops of it
  share concepts, but hardly a word. Among 256 documents that were held out the other crop shall be
  found in at least 90 % of the cases, where TF-IDF finds it in at most 60 %.
- seq2seq: T5's span corruption of a language in which a word and its document's rule give the next
  word, so all that is hidden can be told. Greedy decoding shall give back at least 95 % of the
  targets word for word, up to the first end.

About a minute each on 2 idle cores. A run that is there is continued or measured again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.common import machine, record, table, verdict
from benchmarks.learn_languages import CONCEPTS, CYCLE, NAMES, STATES, cycles, talks, walks
from benchmarks.learn_measures import (
    HELD_OUT,
    logged,
    measure_clm,
    measure_contrastive,
    measure_mlm,
    measure_seq2seq,
)
from benchmarks.synthetic import make_tokenizer, write_shards

ROOT = Path(__file__).resolve().parents[1]
# documents without end; those that are held out come from another seed
Language = Callable[[np.random.Generator], Iterator[np.ndarray]]
# of a run: ``reached``, ``target`` and what it is to be compared with
Measure = Callable[[Path], dict[str, float]]


@dataclass(frozen=True)
class Case:
    """A language, how a model is trained on it, and how the result is judged."""

    vocab: int
    documents: Language
    tokens: int  # of the training text
    config: dict[str, Any]
    measure: Measure
    at_least: bool  # the target is a least, else a most


CASES = {
    "clm": Case(
        STATES + 1,
        walks,
        1_000_000,
        {
            "data": {"seq_len": 64},
            "objective": {"name": "clm"},
            "train": {"steps": 600},
            "optim": {"lr": 3e-3},
            "model": {
                "architecture": "gpt2",
                "config": {
                    "n_layer": 2,
                    "n_embd": 64,
                    "n_head": 4,
                    "n_positions": 64,
                    "resid_pdrop": 0.0,
                    "embd_pdrop": 0.0,
                    "attn_pdrop": 0.0,
                },
            },
        },
        measure_clm,
        at_least=False,
    ),
    "mlm": Case(
        STATES + 1,
        walks,
        4_000_000,
        {
            "data": {"seq_len": 64},
            "objective": {"name": "mlm", "options": {"as_mask": 1.0, "as_random": 0.0}},
            "train": {"steps": 2600, "global_batch": 64},
            "optim": {"lr": 2e-3},
            "model": {
                "architecture": "modernbert",
                "config": {  # BERT's own layers take many steps to begin
                    "hidden_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 256,
                    "local_attention": 64,
                    "max_position_embeddings": 64,
                },
            },
        },
        measure_mlm,
        at_least=False,
    ),
    "contrastive": Case(
        1 + CONCEPTS * NAMES,
        talks,
        4_000_000,
        {
            "data": {"seq_len": 96},
            "objective": {
                "name": "contrastive",
                "options": {"crop": [0.2, 0.3], "temperature": 0.05},
            },
            "train": {"steps": 300, "global_batch": 128},
            "optim": {"lr": 3e-3},
            "model": {
                "architecture": "bert",
                "config": {
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 256,
                    "max_position_embeddings": 128,
                    "hidden_dropout_prob": 0.0,
                    "attention_probs_dropout_prob": 0.0,
                },
            },
        },
        measure_contrastive,
        at_least=True,
    ),
    "seq2seq": Case(
        1 + CYCLE,
        cycles,
        2_000_000,
        {
            "data": {"seq_len": 32},
            "objective": {"name": "seq2seq"},
            "train": {"steps": 4000, "global_batch": 64},
            "optim": {"lr": 3e-3},
            "model": {
                "architecture": "t5",
                "config": {
                    "d_model": 64,
                    "d_kv": 16,
                    "d_ff": 256,
                    "num_layers": 2,
                    "num_heads": 4,
                    "dropout_rate": 0.0,
                },
            },
        },
        measure_seq2seq,
        at_least=True,
    ),
}


def train(name: str, case: Case, folder: Path) -> Path:
    """Return the run directory of a case, trained."""
    folder = folder / name
    if not (folder / "shards").exists():
        write_texts(case, folder)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config_of(case, folder)))
    command = [sys.executable, "-m", "launch.cli", "pretrain", str(file), "--procs", "2"]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder / "runs" / "run"


def write_texts(case: Case, folder: Path) -> None:
    """Write the tokenizer of a case, and its shards for training and validation."""
    tokenizer = folder / "tokenizer"
    make_tokenizer(tokenizer, vocab_size=case.vocab, sentinels=16)
    for side, seed, tokens in (("train", 2, case.tokens), ("validation", 3, 40_000)):
        documents = case.documents(np.random.default_rng(seed))
        write_shards(
            folder / "shards" / side,
            first(documents, tokens),
            tokenizer=tokenizer,
            vocab_size=case.vocab,
        )


def config_of(case: Case, folder: Path) -> dict[str, Any]:
    """Return the values of a case's run in ``folder``."""
    shards = folder / "shards"
    config = {
        "run": {"name": "run", "root": str(folder / "runs")},
        "tokenizer": {"path": str(folder / "tokenizer")},
        **case.config,
        "engine": {"zero_stage": 1, "precision": "fp32"},
        "metrics": {"every_steps": 20},
        "schedule": {"name": "cosine", "warmup_steps": 50},
    }
    config["data"] = {
        **config["data"],
        "sources": [{"shards": str(shards / "train")}],
        "validation": {
            "shards": str(shards / "validation"),
            "every_steps": 50,
            "rows": HELD_OUT,
        },
    }
    config["train"] = {"global_batch": 32, **config["train"]}
    config["train"]["micro_batch"] = config["train"]["global_batch"] // 2
    return config


def first(documents: Iterator[np.ndarray], tokens: int) -> Iterator[np.ndarray]:
    """Yield documents until they have ``tokens`` words."""
    while tokens > 0:
        document = next(documents)
        tokens -= len(document)
        yield document


def plot(runs: dict[str, Path], results: dict[str, dict[str, float]], png: Path) -> None:
    """Return with the curves of the held-out loss in ``png``, beside what no model can beat."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4 * len(runs), 3.2), squeeze=False)
    for axis, (name, run) in zip(axes[0], runs.items(), strict=True):
        shown = "validation_retrieval_accuracy" if name == "contrastive" else "validation_loss"
        axis.plot(*zip(*logged(run, shown), strict=True), label=shown.replace("_", " "))
        for label, style in (("limit", "--"), ("words alone", ":"), ("TF-IDF", ":")):
            if label in results[name]:
                axis.axhline(results[name][label], color="grey", linestyle=style, label=label)
        axis.set(title=name, xlabel="step", ylabel="" if name == "contrastive" else "nats")
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(png, dpi=110)


def main() -> None:
    """Train, measure, print, plot, and write the section ``learn`` of RESULTS.md if all cases were
    asked for.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    about = machine("torch", "deepspeed", "transformers")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        runs = {name: train(name, CASES[name], folder) for name in options.cases}
        results = {name: CASES[name].measure(run) for name, run in runs.items()}
        if options.png:
            plot(runs, results, options.png)
    rows = []
    for name, result in results.items():
        reached, target = result.pop("reached"), result.pop("target")
        if CASES[name].at_least:
            judged = verdict(reached, at_least=target)
        else:
            judged = verdict(reached, at_most=target)
        beside = ", ".join(f"{what} {value:.4f}" for what, value in result.items())
        rows.append([name, f"{reached:.4f}", judged, beside])
    body = about + "\n\n" + table(["objective", "reached", "target", "beside"], rows)
    if set(options.cases) == set(CASES):
        record("learn", body)
    else:
        print(body)


if __name__ == "__main__":
    main()
