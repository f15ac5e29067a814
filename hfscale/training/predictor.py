"""Text generation from a causal model: prompts in, one continuation each, in the order given.

Shape legend: B prompts of a batch, T tokens of the longest of them. Shorter prompts are padded on the left.
"""
from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfscale.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 takes the likeliest."""

    max_new_tokens: int = 64  # fewer where the model's positions end
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 17


@dataclass(frozen=True)
class Prompt:
    """A prompt and the name under which its answer is found again."""

    id: str
    text: str


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt], *, sampling: Sampling,
             batch: int = 8) -> Iterator[dict[str, str]]:
    """Yield ``{"id", "prompt", "text"}`` for each prompt; ``text`` is the continuation alone.

    Raises:
        ConfigError: if a prompt leaves no room in the model's positions.
    """
    torch.manual_seed(sampling.seed)
    pending = iter(prompts)
    while chunk := list(islice(pending, batch)):
        rows = [_encode(tokenizer, prompt) for prompt in chunk]
        width = max(map(len, rows))
        new_tokens = min(sampling.max_new_tokens, _room(model, chunk[[len(row) for row in rows].index(width)], width))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        ids_BT = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        drawn: dict[str, Any] = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.inference_mode():
            out_BT = cast("Any", model).generate(ids_BT, attention_mask=mask_BT, max_new_tokens=new_tokens, pad_token_id=pad,
                                    **(drawn if sampling.temperature > 0 else {"do_sample": False}))
        for prompt, row in zip(chunk, out_BT, strict=True):
            yield {"id": prompt.id, "prompt": prompt.text, "text": str(tokenizer.decode(row[width:], skip_special_tokens=True))}


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the prompt's ids; an empty prompt starts a document, as the corpus does after every document's end."""
    ids = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start or 0]


def _room(model: PreTrainedModel, prompt: Prompt, length: int) -> int:
    """Return how many tokens the model's positions leave after a prompt of ``length`` tokens."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return sys.maxsize
    if length >= positions:
        raise ConfigError(f"prompt {prompt.id!r} leaves no room in the model's {positions} positions", where=f"prompt {prompt.id}",
                          value=f"{length} tokens", remedy=f"shorten it to {positions - 1} tokens or fewer")
    return positions - length
