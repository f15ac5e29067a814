"""Tokens drawn of a distribution, the same for a prompt whatever stands beside it.

Shape legend: B prompts, V vocabulary.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

OF_DRAWING = (
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


class Draw(LogitsProcessor):
    """Leaves one token a row, drawn by inversion: one uniform number a token, from a generator of
    the row's own (Philox).
    """

    def __init__(self, config: GenerationConfig, seed: int, keys: list[str]) -> None:
        numbers = [
            int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") for key in keys
        ]
        self._draws = [
            np.random.Generator(np.random.Philox(key=[seed, number])) for number in numbers
        ]
        top_k = 50 if config.top_k is None else config.top_k  # transformers' default
        chosen = [  # in its order
            (TemperatureLogitsWarper, float(config.temperature or 1.0), True),
            (TopHLogitsWarper, config.top_h, config.top_h is not None),
            (TopKLogitsWarper, top_k, top_k),
            (TopPLogitsWarper, config.top_p, (config.top_p or 1.0) < 1.0),
            (MinPLogitsWarper, config.min_p, config.min_p is not None),
            (TypicalLogitsWarper, config.typical_p, (config.typical_p or 1.0) < 1.0),
            (EpsilonLogitsWarper, config.epsilon_cutoff, config.epsilon_cutoff),
            (EtaLogitsWarper, config.eta_cutoff, config.eta_cutoff),
        ]
        self._warpers: list[LogitsProcessor] = [
            kind(value) for kind, value, wanted in chosen if wanted
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        cumulated_BV = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        u_B1 = torch.tensor(
            [[draw.random()] for draw in self._draws], dtype=torch.float64, device=scores.device
        )
        token_B1 = torch.searchsorted(cumulated_BV, u_B1 * cumulated_BV[:, -1:], right=True)
        return torch.full_like(scores, float("-inf")).scatter(
            1, token_B1.clamp_(max=scores.shape[-1] - 1), 0.0
        )
