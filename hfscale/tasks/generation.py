"""Batched generation by transformers' ``generate``, for every task that answers in text, at any
ZeRO stage.

What is generated follows, in this order, the options of the user, the model's own
generation_config.json, and what the task knows. An answer ends with any of the model's own end
tokens, or of those that the task teaches. An answer depends on its own prompt, the settings and,
where tokens are drawn, on (seed, key of the prompt): never on the prompts beside it, the rank or
what was generated before. So a prediction that was interrupted goes on as if it had not been.

Shape legend: B prompts, T tokens of the longest of them, V vocabulary. Decoders' prompts are padded
on the left, encoders' on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
from pydantic import Field
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from hfscale.config.section import Positive, Section
from hfscale.dist.agree import from_all_ranks
from hfscale.dist.group import everybody
from hfscale.errors import ConfigError
from hfscale.log import logger
from hfscale.models.call import Model, live
from hfscale.stream.examples import BadExample, Examples
from hfscale.tasks.base import Task, pad_rows
from hfscale.tasks.drawing import OF_DRAWING, Draw
from hfscale.tasks.prompts import decoder_start, longest_prompt

NEW_TOKENS = 64  # where neither the options nor the model's generation_config.json say how many
# settings of transformers that give another number of answers, or depend on the clock
UNFOLLOWED = (
    "num_return_sequences",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "max_time",
)
HARMLESS = {  # settings that look at no id of a prompt
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams"),
    *("length_penalty", "early_stopping", "do_sample", "use_cache", "disable_compile"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
    *("transformers_version", "_from_model_config", "suppress_tokens", "remove_invalid_values"),
}
NEUTRAL = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1.0,),
    "num_beam_groups": (1,),
}
# of an encoder-decoder: these look at what was written, which has no padding before it
OF_ONES_OWN_TEXT = {
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens"),
}


class Generation(Section):
    """How answers are generated, in the words of transformers' GenerationConfig. None: as the
    model's own generation_config says.
    """

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

    def settings(self) -> dict[str, object]:
        """Return what was set, as keywords of a GenerationConfig."""
        return self.model_dump(exclude_none=True, exclude={"seed", "truncate"})

    def carry(
        self,
        model: PreTrainedModel,
        *,
        ends: Sequence[int],
        limit: int,
        pad_id: int,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Put what ``resolve`` says into the generation_config.json that is saved with
        ``model``.
        """
        own = resolve(model, self, ends=ends, limit=limit, settings=settings)
        own.do_sample = bool(own.do_sample)  # pipelines have other defaults
        own.pad_token_id = pad_id
        own._from_model_config = False  # else transformers may make it anew from config.json
        model.generation_config = own


def resolve(
    model: PreTrainedModel,
    options: Generation,
    *,
    ends: Sequence[int],
    limit: int = NEW_TOKENS,
    settings: Mapping[str, object] | None = None,
) -> GenerationConfig:
    """Return how ``model`` generates: ``options``, then ``settings`` (of the task, said by the
    user), then as it says itself.

    Where nobody says how many tokens, they are ``limit``. ``ends`` (ids) end an answer as the
    model's own do.
    """
    own: GenerationConfig = deepcopy(model.generation_config)
    asked = {**(settings or {}), **options.settings()}
    if "max_new_tokens" in asked:
        own.max_length = None
    elif own.max_new_tokens is None and own.max_length is None:
        own.max_new_tokens = limit
    if "min_new_tokens" in asked:
        own.min_length = None
    for name, value in asked.items():
        setattr(own, name, value)  # update() would warn of what is set for drawing
    known = [id_ for id_ in _listed(own.eos_token_id) if id_ < model.config.vocab_size]
    both = [*dict.fromkeys([*ends, *known])]
    own.eos_token_id = both[0] if len(both) == 1 else both or None
    return own


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@dataclass(frozen=True)
class _Asked:
    """A prompt that fits the model, and how many tokens may and must follow."""

    ids: list[int]
    most: int
    least: int
    alike: int  # prompts are padded to one another where this is equal


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[list[int]],
    options: Generation,
    *,
    keys: Sequence[str],
    pad_id: int,
    ends: Sequence[int] = (),
    limit: int = NEW_TOKENS,
    settings: Mapping[str, object] | None = None,
) -> list[list[int]]:
    """Return the new ids of each prompt (ids) up to its end token, which is left out; what is set
    as ``resolve`` says.

    ``model`` is an engine or a bare model in evaluation mode. Under ZeRO 3 on several ranks all
    must call, with any number of prompts: a rank that has finished goes on until the last has.

    Raises:
        ConfigError: for a prompt that leaves no room in the model's positions, unless
            ``options.truncate``.
    """
    own = live(model)
    config = resolve(own, options, ends=ends, limit=limit, settings=settings)
    stops = {*_listed(config.eos_token_id)}
    drawn, config = _of_one_answer(config, pad_id)
    encoder = bool(own.config.is_encoder_decoder)
    if encoder and config.decoder_start_token_id is None:
        config.decoder_start_token_id = decoder_start(own.config, pad_id)
    apart = _reads_padding(own, config)
    asked = [
        _fit(prompt, own.config, config, key=key, truncate=options.truncate, apart=apart)
        for prompt, key in zip(prompts, keys, strict=True)
    ]
    passes = _passes(asked)
    synced = everybody().size > 1 and any(hasattr(p, "ds_id") for p in own.parameters())
    if synced:
        count = max(from_all_ranks(len(passes)))
        passes += [(1, 0, [])] * (count - len(passes))
    answers: list[list[int]] = [[]] * len(prompts)
    for most, least, rows in passes:
        ids_BT, mask_BT = pad_rows(
            [asked[row].ids for row in rows] or [[0]], pad_id, left=not encoder
        )
        config.max_length, config.max_new_tokens = None, most
        config.min_length, config.min_new_tokens = None, least
        draws = [Draw(drawn, options.seed, [keys[row] for row in rows])] if drawn and rows else []
        with _generating_as(own, config):
            out_BT = own.generate(
                ids_BT.to(own.device),
                attention_mask=mask_BT.to(own.device),
                logits_processor=draws,
                synced_gpus=synced,
            )
        new_BT = out_BT[:, 1 if encoder else ids_BT.shape[1] :].tolist()
        for row, ids in zip(rows, new_BT, strict=bool(rows)):
            answers[row] = ids[: next((n for n, id_ in enumerate(ids) if id_ in stops), len(ids))]
    return answers


def _passes(asked: Sequence[_Asked]) -> list[tuple[int, int, list[int]]]:
    """Return (most, fewest new tokens, rows) of each call of a model's ``generate``: prompts that
    ask for the same, the shortest first.
    """
    groups: dict[tuple[int, int, int], list[int]] = {}
    for row in sorted(range(len(asked)), key=lambda row: (len(asked[row].ids), row)):
        one = asked[row]
        groups.setdefault((one.most, one.least, one.alike), []).append(row)
    return [(most, least, rows) for (most, least, _), rows in groups.items()]


def _of_one_answer(
    config: GenerationConfig, pad_id: int
) -> tuple[GenerationConfig | None, GenerationConfig]:
    """Return how tokens are drawn, if they are, and the rest of ``config``, for one answer a
    prompt.

    Raises:
        ConfigError: where tokens are both drawn and found by beam search.
    """
    drawn = deepcopy(config) if config.do_sample else None
    if drawn and (config.num_beams or 1) > 1:
        raise ConfigError(
            "tokens are drawn, or found by beam search, not both",
            where="generation.do_sample",
            value=True,
            remedy="set do_sample=false or num_beams=1",
        )
    for name in UNFOLLOWED:
        if getattr(config, name) not in (None, False, 1):
            say_once(f"generation: {name}={getattr(config, name)} of the model is not followed")
        setattr(config, name, None)
    config.stop_strings = None  # ``written`` cuts the text
    for name in OF_DRAWING:  # transformers would warn of them
        setattr(config, name, None)
    config.do_sample, config.pad_token_id = False, pad_id
    return drawn, config


@contextmanager
def _generating_as(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Let ``model`` have this generation_config inside: what a config that is given leaves open is
    filled from the model's own.
    """
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _reads_padding(model: PreTrainedModel, config: GenerationConfig) -> bool:
    """Return whether an answer could depend on how its prompt is padded: no setting that looks at
    the ids is known not to.

    A model with a state of its own takes padding in.
    """
    harmless = HARMLESS | (OF_ONES_OWN_TEXT if model.config.is_encoder_decoder else set())
    return bool(getattr(model, "_is_stateful", False)) or any(
        value not in (None, False, *NEUTRAL.get(name, ()))
        for name, value in config.to_dict().items()
        if name not in harmless
    )


@cache
def say_once(text: str) -> None:
    """Log a warning that would come with each batch."""
    logger.warning(text)


def written(
    task: Task,
    model: Model,
    rows: Examples,
    *,
    options: Generation,
    of: str = "input_ids",
    strings: Sequence[str] = (),
    ends: Sequence[int] = (),
    limit: int = NEW_TOKENS,
    settings: Mapping[str, object] | None = None,
) -> list[str]:
    """Return the text that ``model`` writes for each row: to the ids under ``of``, drawn if at all
    by the number of its example.

    It ends before any of ``strings``, and those that the model says itself.
    """
    keys = [str(row.get("example", number)) for number, row in enumerate(rows.features)]
    answers = generate(
        model,
        [row[of] for row in rows.features],
        options,
        keys=keys,
        pad_id=task.pad_id,
        ends=ends,
        limit=limit,
        settings=settings,
    )
    own = live(model).generation_config.stop_strings or ()
    stops = [*strings, *([own] if isinstance(own, str) else own)]
    texts = [task.setting.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    return [text[: min((text.find(s) for s in stops if s in text), default=None)] for text in texts]


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
            f"the prompt has {len(ids)} tokens, and the model's positions have room for "
            f"{longest}: shorten it, or set "
            "generation.truncate"
        )


def _fit(
    prompt: list[int],
    config: PretrainedConfig,
    how: GenerationConfig,
    *,
    key: str,
    truncate: bool,
    apart: bool,
) -> _Asked:
    """Return the prompt, cut if that is allowed and needed, and how many tokens may and must
    follow.
    """
    encoder, longest = config.is_encoder_decoder, longest_prompt(config)
    before = 1 if encoder else len(prompt)  # lengths count what the decoder has seen
    most = how.max_new_tokens or (how.max_length or 0) - before
    if most < 1:
        say_once(f"generation: max_length={how.max_length} of the model has no room for prompts")
        most = NEW_TOKENS
    if longest is not None:
        positions = longest + (not encoder)
        most = min(most, positions - 1)
        if len(prompt) > longest:
            if not truncate:
                raise ConfigError(
                    f"prompt {key!r} leaves no room in the model's {positions} positions",
                    where=f"prompt {key}",
                    value=f"{len(prompt)} tokens",
                    remedy=f"shorten it to {longest} tokens or fewer, or set generation.truncate",
                )
            prompt = prompt[:longest] if encoder else prompt[most - positions :]
        most = most if encoder else min(most, positions - len(prompt))
    least = max(how.min_new_tokens or 0, (how.min_length or 0) - before)
    if least > most:
        say_once(f"generation: at least {least} new tokens are wanted, and there may be {most}")
    return _Asked(prompt, most, min(least, most), len(prompt) if apart else 0)
