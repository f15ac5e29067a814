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
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.common import machine, record, table, verdict
from benchmarks.synthetic import make_tokenizer, write_shards

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 256  # rows or documents


@dataclass(frozen=True)
class Case:
    """A language, how a model is trained on it, and how the result is judged."""

    vocab: int
    documents: Callable[
        [np.random.Generator], Iterator[np.ndarray]
    ]  # without end; those that are held out come from another seed
    tokens: int  # of the training text
    config: dict[str, Any]
    measure: Callable[
        [Path], dict[str, float]
    ]  # of a run: ``reached``, ``target`` and what it is to be compared with
    at_least: bool  # the target is a least, else a most


# ------------------------------------------------------------------------------------ the languages
STATES = 32


def chain() -> np.ndarray:
    """Return the transition probabilities (STATES, STATES) of the Markov chain."""
    return np.random.default_rng(1).dirichlet(np.full(STATES, 0.15), STATES)


def stationary(P: np.ndarray) -> np.ndarray:
    """Return the share of each state."""
    values, vectors = np.linalg.eig(P.T)
    share = np.real(vectors[:, np.argmax(np.real(values))])
    return share / share.sum()


def entropies() -> tuple[float, float]:
    """Return the chain's entropy, and that of its words one by one; nats a word."""
    P = chain()
    share, log = stationary(P), np.log(np.maximum(P, 1e-300))
    return float(-(share[:, None] * P * log).sum()), float(-(share * np.log(share)).sum())


def walks(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield long walks along the chain; state s is word s + 1."""
    steps = chain().cumsum(1)
    while True:
        draws, at, states = rng.random(8192), 0, list[int]()
        for draw in draws:
            at = min(np.searchsorted(steps[at], draw).item(), STATES - 1)
            states.append(at)
        yield np.array(states) + 1


CONCEPTS, NAMES, SPOKEN, WORDS = 64, 64, 8, 95  # with the end of the document a row


def talks(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield documents of WORDS words about SPOKEN concepts, each named by any of its NAMES."""
    while True:
        concepts = rng.choice(CONCEPTS, SPOKEN, replace=False)
        yield 1 + rng.choice(concepts, WORDS) * NAMES + rng.integers(NAMES, size=WORDS)


RULES, CYCLE = 4, 64


def cycles(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield documents of one row: all words in the order of one of RULES cycles, from any on."""
    orders = [np.random.default_rng(rule).permutation(CYCLE) for rule in range(RULES)]
    while True:
        order, start = orders[rng.integers(RULES)], rng.integers(CYCLE)
        yield 1 + order[(start + np.arange(31)) % CYCLE]  # with the end of the document 32


# ----------------------------------------------------------------------------------------- measures
def opened(run: Path) -> tuple[Any, Any, Any]:
    """Return model, tokenizer and objective of a run."""
    from hfscale.config.schema import RunConfig
    from hfscale.objectives.base import Setting, load_objective
    from hfscale.run.model import RunModel, find

    found = find(run)
    assert isinstance(found, RunModel) and isinstance(found.run, RunConfig), run
    data = found.run.data
    objective = load_objective(
        found.run.objective,
        Setting(
            seq_len=data.seq_len,
            seed=99,
            tokenizer=found.tokenizer,
            model_config=found.skeleton.config,
        ),
    )
    return found.engine().module, found.tokenizer, objective


def held_out(run: Path, objective: Any) -> Any:
    """Return one batch of HELD_OUT rows of the validation shards."""
    from hfscale.dist.world import Place
    from hfscale.stream.loader import EvaluationRows
    from hfscale.stream.rows import TokenRows

    rows = TokenRows(run.parents[1] / "shards" / "validation", seq_len=objective.setting.seq_len)
    [batch] = EvaluationRows(
        rows, count=HELD_OUT, micro_batch=HELD_OUT, place=Place(), with_documents=True
    )
    return objective.collate(batch)


def measure_clm(run: Path) -> dict[str, float]:
    """Return the held-out loss beside the entropy."""
    entropy, unigram = entropies()
    return {
        "reached": logged(run, "validation_loss")[-1][1],
        "target": entropy * 1.02,
        "limit": entropy,
        "words alone": unigram,
    }


@torch.no_grad()
def measure_mlm(run: Path) -> dict[str, float]:
    """Return the held-out loss beside an oracle's on the same masks."""
    model, _, objective = opened(run)
    batch = held_out(run, objective)
    loss = float(objective.loss(model.eval(), batch)["mlm"].sum() / batch.counts["mlm"].sum())
    oracle = oracle_loss(batch.inputs["input_ids"].numpy(), batch.labels_BT.numpy())
    return {
        "reached": loss,
        "target": oracle * 1.05,
        "limit": oracle,
        "words alone": entropies()[1],
    }


def oracle_loss(inputs_BT: np.ndarray, labels_BT: np.ndarray) -> float:
    """Return the mean of -log p(hidden word | all that is not hidden) under the chain:
    forward-backward (Rabiner 1989, sec. III).
    """
    P, share = chain(), stationary(chain())
    losses: list[float] = []
    for inputs_T, labels_T in zip(inputs_BT, labels_BT, strict=True):
        T = len(inputs_T)
        seen = [
            np.eye(STATES)[word - 1] if 1 <= word <= STATES else np.ones(STATES)
            for word in inputs_T
        ]  # all else says nothing
        ahead, behind = [share], [np.ones(STATES)]
        for t in range(T - 1):
            message = (ahead[-1] * seen[t]) @ P
            ahead.append(message / message.sum())
        for t in range(T - 1, 0, -1):
            message = P @ (behind[-1] * seen[t])
            behind.append(message / message.sum())
        for t in np.flatnonzero((labels_T >= 1) & (labels_T <= STATES)).tolist():
            belief = ahead[t] * behind[T - 1 - t]
            losses.append(-float(np.log(belief[labels_T[t] - 1] / belief.sum())))
    return float(np.mean(losses))


@torch.no_grad()
def measure_contrastive(run: Path) -> dict[str, float]:
    """Return how often the other crop of a held-out document is found among HELD_OUT, beside TF-IDF
    and the untrained encoder.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    model, _, objective = opened(run)
    batch = held_out(run, objective)
    torch.manual_seed(0)
    fresh = type(model)(model.config)
    a_nH, p_nH = objective.embed(model.eval(), batch)
    a0_nH, p0_nH = objective.embed(fresh.eval(), batch)
    texts = [
        " ".join(map(str, ids[mask.bool()].tolist()))
        for ids, mask in zip(
            *(batch.inputs[n] for n in ("input_ids", "attention_mask")), strict=True
        )
    ]
    rare = TfidfVectorizer(token_pattern=r"\S+").fit_transform(texts).toarray()  # type: ignore[attr-defined]
    return {
        "reached": found(a_nH @ p_nH.T),
        "target": 0.9,
        "TF-IDF": found(torch.from_numpy(rare[:HELD_OUT] @ rare[HELD_OUT:].T)),
        "untrained": found(a0_nH @ p0_nH.T),
        "chance": 1 / HELD_OUT,
    }


def found(scores_nn: torch.Tensor) -> float:
    """Return the share of texts whose own partner has the highest score."""
    return float((scores_nn.argmax(1) == torch.arange(len(scores_nn))).float().mean())


@torch.no_grad()
def measure_seq2seq(run: Path) -> dict[str, float]:
    """Return the share of held-out targets that greedy decoding gives back word for word."""
    model, _, objective = opened(run)
    batch = held_out(run, objective)
    out = model.eval().generate(
        batch.inputs["input_ids"],
        max_new_tokens=batch.labels_BT.shape[1],
        do_sample=False,
        num_beams=1,
    )
    labels_BU = batch.labels_BT
    out_BU = torch.nn.functional.pad(out[:, 1:], (0, labels_BU.shape[1]), value=-1)[
        :, : labels_BU.shape[1]
    ]
    ended_BU = (labels_BU == 0).cumsum(1) - (
        labels_BU == 0
    ).long() > 0  # decoding ends there, also where a document's end was hidden
    return {
        "reached": float(((out_BU == labels_BU) | ended_BU).all(1).float().mean()),
        "target": 0.95,
    }


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of what a run logged under ``name``."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry[name]) for entry in records if name in entry]


# ---------------------------------------------------------------------------------------- the cases
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
    tokenizer = folder / "tokenizer"
    if not (folder / "shards").exists():
        make_tokenizer(tokenizer, vocab_size=case.vocab, sentinels=16)
        for side, seed, tokens in (("train", 2, case.tokens), ("validation", 3, 40_000)):
            write_shards(
                folder / "shards" / side,
                first(case.documents(np.random.default_rng(seed)), tokens),
                tokenizer=tokenizer,
                vocab_size=case.vocab,
            )
    config = {
        "run": {"name": "run", "root": str(folder / "runs")},
        "tokenizer": {"path": str(tokenizer)},
        **case.config,
        "engine": {"zero_stage": 1, "precision": "fp32"},
        "metrics": {"every_steps": 20},
        "schedule": {"name": "cosine", "warmup_steps": 50},
    }
    config["data"] = {
        **config["data"],
        "sources": [{"shards": str(folder / "shards" / "train")}],
        "validation": {
            "shards": str(folder / "shards" / "validation"),
            "every_steps": 50,
            "rows": HELD_OUT,
        },
    }
    config["train"] = {"global_batch": 32, **config["train"]}
    config["train"]["micro_batch"] = config["train"]["global_batch"] // 2
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.cli",
            "pretrain",
            str(folder / "config.yaml"),
            "--procs",
            "2",
        ],
        cwd=ROOT,
        check=True,
    )
    return folder / "runs" / "run"


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
        judged = (
            verdict(reached, at_least=target)
            if CASES[name].at_least
            else verdict(reached, at_most=target)
        )
        rows.append(
            [
                name,
                f"{reached:.4f}",
                judged,
                ", ".join(f"{what} {value:.4f}" for what, value in result.items()),
            ]
        )
    body = about + "\n\n" + table(["objective", "reached", "target", "beside"], rows)
    if set(options.cases) == set(CASES):
        record("learn", body)
    else:
        print(body)


if __name__ == "__main__":
    main()
