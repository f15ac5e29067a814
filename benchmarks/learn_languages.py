"""The made-up languages of ``benchmarks/learn.py``, as documents without end, and their entropy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

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
