"""Batched generation by transformers' ``generate``, for every task that answers in text, at any ZeRO stage.

An answer depends on its own prompt, the settings and, where tokens are drawn, on (seed, key of the prompt): never on the prompts
beside it, the rank or what was generated before. So a prediction that was interrupted goes on as if it had not been.

Shape legend: B prompts, T tokens of the longest of them, V vocabulary. Decoders' prompts are padded on the left, encoders' on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from hashlib import blake2b
from itertools import groupby
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as torch_dist
from pydantic import Field
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PretrainedConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hfscale.config.schema import Positive, Section
from hfscale.dist.agree import gather_from_ranks
from hfscale.errors import ConfigError
from hfscale.models.build import longest_row
from hfscale.stream.examples import BadExample, Examples
from hfscale.tasks.base import Task, pad_rows

NEW_TOKENS = 64  # where neither the options nor the model's generation_config.json say how many


class Generation(Section):
    """How answers are generated, in the words of transformers' GenerationConfig. None: as the model's own generation_config says."""

    max_new_tokens: Positive | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    num_beams: Positive | None = None
    length_penalty: float | None = None  # of beam search: above 0 favours long answers
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    do_sample: bool | None = None  # False takes the likeliest
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17
    truncate: bool = (
        False  # prompts that leave no room: decoders lose their beginning, encoders their end
    )

    def settings(self) -> dict[str, Any]:
        """Return what was set, as keywords of a GenerationConfig."""
        return self.model_dump(exclude_none=True, exclude={"seed", "truncate"})

    def carry(self, model: Any, **settings: Any) -> None:
        """Put these and other ``settings`` into the generation_config.json that is saved with ``model``."""
        own: GenerationConfig = model.generation_config
        said = {
            "do_sample": bool(own.do_sample),
            "max_new_tokens": own.max_new_tokens or NEW_TOKENS,
        }  # pipelines have other defaults
        own.update(**said | settings | self.settings())
        own._from_model_config = False  # else transformers may make it anew from config.json


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    options: Generation,
    *,
    keys: Sequence[str],
    pad_id: int,
    **settings: Any,
) -> list[list[int]]:
    """Return the new ids of each prompt (ids), padding included; ``settings`` (an eos, a forced bos, ...) go over the model's own.

    ``model`` is an engine or a bare model in evaluation mode. Under ZeRO 3 on several ranks all must call, with any number of prompts:
    a rank that has finished goes on until the last has.

    Raises:
        ConfigError: for a prompt that leaves no room in the model's positions, unless ``options.truncate``.
    """
    model = getattr(model, "module", model)
    config: GenerationConfig = deepcopy(model.generation_config)
    for name, value in (
        {"max_new_tokens": config.max_new_tokens or NEW_TOKENS} | settings | options.settings()
    ).items():
        setattr(
            config, name, value
        )  # update() would warn of what is set for drawing where none is done
    config.max_length, config.pad_token_id = None, pad_id
    drawn, config.do_sample = config.do_sample and deepcopy(config), False
    config.temperature = config.top_k = config.top_p = (
        None  # of drawing alone: transformers would warn of them
    )
    if drawn and (config.num_beams or 1) > 1:
        raise ConfigError(
            "tokens are drawn, or found by beam search, not both",
            where="generation.do_sample",
            value=True,
            remedy="set do_sample=false or num_beams=1",
        )
    if encoder := model.config.is_encoder_decoder:
        config.decoder_start_token_id = decoder_start(model.config, pad_id)
    fitted, rooms = (
        zip(
            *(
                _fit(
                    prompt, model.config, config.max_new_tokens, key=key, truncate=options.truncate
                )
                for prompt, key in zip(prompts, keys, strict=True)
            ),
            strict=True,
        )
        if prompts
        else ((), ())
    )
    order = sorted(range(len(prompts)), key=lambda row: len(fitted[row]))
    groups = [(room, list(rows)) for room, rows in groupby(order, key=lambda row: rooms[row])]
    synced = (
        torch_dist.is_initialized()
        and torch_dist.get_world_size() > 1
        and any(hasattr(p, "ds_id") for p in model.parameters())
    )
    if synced:
        most = int(gather_from_ranks(torch.tensor([len(groups)], device=model.device))[0].max())
        groups += [(1, [])] * (most - len(groups))
    answers: list[list[int]] = [[]] * len(prompts)
    for room, rows in groups:
        ids_BT, mask_BT = pad_rows([fitted[row] for row in rows] or [[0]], pad_id, left=not encoder)
        config.max_new_tokens = room
        config.min_new_tokens = min(config.min_new_tokens or 0, room)
        draws = [_Draw(drawn, options.seed, [keys[row] for row in rows])] if drawn and rows else []
        out_BT = model.generate(
            ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=config,
            logits_processor=draws,
            synced_gpus=synced,
        )
        for row, ids in zip(
            rows, out_BT[:, 1 if encoder else ids_BT.shape[1] :].tolist(), strict=False
        ):
            answers[row] = ids
    return answers


def written(
    task: Task,
    model: Any,
    rows: Examples,
    *,
    options: Generation,
    of: str = "input_ids",
    **settings: Any,
) -> list[str]:
    """Return the text that ``model`` writes for each row: to the ids under ``of``, drawn if at all by the number of its example."""
    keys = [str(row.get("example", number)) for number, row in enumerate(rows.features)]
    answers = generate(
        model,
        [row[of] for row in rows.features],
        options,
        keys=keys,
        pad_id=task.pad_id,
        **settings,
    )
    return [task.setting.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def decoder_start(config: PretrainedConfig | None, pad_id: int) -> int:
    """Return the id with which a decoder begins: the config's, else padding, as T5 has it."""
    start = getattr(config, "decoder_start_token_id", None)
    return pad_id if start is None else int(start)


def longest_prompt(config: PretrainedConfig) -> int | None:
    """Return how many tokens a prompt may have; None: positions are relative, and it may have any number."""
    return (
        None
        if (longest := longest_row(config)) is None
        else longest - (not config.is_encoder_decoder)
    )


def check_prompt(task: Task, ids: Sequence[int], options: Generation) -> None:
    """Refuse a prompt that leaves no room, where the model is known and ``options`` do not cut it.

    Raises:
        BadExample: so that the other rows of a table are answered.
    """
    longest = (
        None if task.setting.model_config is None else longest_prompt(task.setting.model_config)
    )
    if longest is not None and len(ids) > longest and not options.truncate:
        raise BadExample(
            f"the prompt has {len(ids)} tokens, and the model's positions have room for {longest}: shorten it, or set "
            "generation.truncate"
        )


def _fit(
    prompt: list[int], config: Any, new_tokens: int, *, key: str, truncate: bool
) -> tuple[list[int], int]:
    """Return the prompt, cut if that is allowed and needed, and how many tokens may follow."""
    if (longest := longest_prompt(config)) is None:
        return prompt, new_tokens
    positions = longest + (not config.is_encoder_decoder)
    new_tokens = min(new_tokens, positions - 1)
    if len(prompt) > longest:
        if not truncate:
            raise ConfigError(
                f"prompt {key!r} leaves no room in the model's {positions} positions",
                where=f"prompt {key}",
                value=f"{len(prompt)} tokens",
                remedy=f"shorten it to {longest} tokens or fewer, or set generation.truncate",
            )
        prompt = prompt[:longest] if config.is_encoder_decoder else prompt[new_tokens - positions :]
    return prompt, new_tokens if config.is_encoder_decoder else min(
        new_tokens, positions - len(prompt)
    )


class _Draw(LogitsProcessor):
    """Leaves one token a row, drawn by inversion: one uniform number a token, from a generator of the row's own (Philox)."""

    def __init__(self, config: GenerationConfig, seed: int, keys: list[str]) -> None:
        numbers = [
            int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") for key in keys
        ]
        self._draws = [
            np.random.Generator(np.random.Philox(key=[seed, number])) for number in numbers
        ]
        self._warpers: list[LogitsProcessor] = [
            TemperatureLogitsWarper(float(config.temperature or 1.0))
        ]
        if top_k := 50 if config.top_k is None else config.top_k:  # transformers' default
            self._warpers.append(TopKLogitsWarper(top_k))
        if (config.top_p or 1.0) < 1.0:
            self._warpers.append(TopPLogitsWarper(config.top_p))

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
