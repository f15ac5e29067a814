"""Text generation from a causal model: prompts in, one continuation each, in the order given.

Shape legend: B prompts of a batch, T tokens of the longest of them. Shorter prompts are padded on the left.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfscale.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 takes the likeliest."""

    max_new_tokens: int = 64
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
        _check_room(model, chunk, [len(row) for row in rows], sampling=sampling)
        width = max(map(len, rows))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        ids_BT = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.inference_mode():
            out_BT = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=sampling.max_new_tokens, pad_token_id=pad,
                                    **(drawn if sampling.temperature > 0 else {"do_sample": False}))
        for prompt, row in zip(chunk, out_BT, strict=True):
            yield {"id": prompt.id, "prompt": prompt.text, "text": tokenizer.decode(row[width:], skip_special_tokens=True)}


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the prompt's ids; an empty prompt starts a document, as the corpus does after every document's end."""
    ids = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start or 0]


def _check_room(model: PreTrainedModel, prompts: list[Prompt], lengths: list[int], *, sampling: Sampling) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    for prompt, length in zip(prompts, lengths, strict=True):
        if positions is not None and length + sampling.max_new_tokens > positions:
            raise ConfigError(f"prompt {prompt.id!r} leaves no room in the model's {positions} positions", where=f"prompt {prompt.id}",
                              value=f"{length} tokens + {sampling.max_new_tokens} new ones",
                              remedy=f"shorten it to {max(positions - sampling.max_new_tokens, 0)} tokens or lower --max-new-tokens")
