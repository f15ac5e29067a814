"""What ``benchmarks/learn.py`` measures of a trained run, on text that was held out, and what it is
compared with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learn_languages import STATES, chain, entropies, stationary

HELD_OUT = 256  # rows or documents


def opened(run: Path) -> tuple[Any, Any, Any]:
    """Return model, tokenizer and objective of a run."""
    from hfscale.config.schema import RunConfig
    from hfscale.objectives.base import Setting, load_objective
    from hfscale.run.model import RunModel, find

    found = find(run)
    assert isinstance(found, RunModel) and isinstance(found.run, RunConfig), run
    data = found.run.data
    setting = Setting(
        seq_len=data.seq_len,
        seed=99,
        tokenizer=found.tokenizer,
        model_config=found.skeleton.config,
    )
    objective = load_objective(found.run.objective, setting)
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
        T, seen = len(inputs_T), []
        for word in inputs_T:
            known = 1 <= word <= STATES  # all else says nothing
            seen.append(np.eye(STATES)[word - 1] if known else np.ones(STATES))
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
    texts = []
    both = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    for ids_T, mask_T in both:
        texts.append(" ".join(map(str, ids_T[mask_T.bool()].tolist())))
    counted = TfidfVectorizer(token_pattern=r"\S+").fit_transform(texts)
    rare = counted.toarray()  # type: ignore[attr-defined]
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
    U = labels_BU.shape[1]
    out_BU = torch.nn.functional.pad(out[:, 1:], (0, U), value=-1)[:, :U]
    is_end_BU = (labels_BU == 0).long()
    # decoding ends at the first end, also where a document's end was hidden
    ended_BU = is_end_BU.cumsum(1) - is_end_BU > 0
    right_B = ((out_BU == labels_BU) | ended_BU).all(1)
    return {"reached": float(right_B.float().mean()), "target": 0.95}


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of what a run logged under ``name``."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry[name]) for entry in records if name in entry]
