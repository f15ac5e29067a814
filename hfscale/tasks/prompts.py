"""A text that a model goes on with: its ids, and the room that there is for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hfscale.models.build import longest_row

if TYPE_CHECKING:
    from transformers import BatchEncoding, PretrainedConfig, PreTrainedTokenizerBase


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    encode: Callable[..., BatchEncoding] | None = None,
) -> list[int]:
    """Return the ids of a text that is gone on with: where the tokenizer puts a token before texts
    this is there, but none after.

    Of those before only the beginning of a text stays: [CLS] is the other half of a frame.
    ``encode`` is the tokenizer, or what takes its place for texts of others in a template.
    """
    encode = encode or tokenizer
    whole = list(encode(text)["input_ids"])
    bare = list(encode(text, add_special_tokens=False)["input_ids"])
    begin = [tokenizer.bos_token_id]
    return begin + bare if whole[:1] == begin and bare[:1] != begin else bare


def decoder_start(config: PretrainedConfig | None, pad_id: int) -> int:
    """Return the id with which a decoder begins: the config's, else padding, as T5 has it."""
    start = getattr(config, "decoder_start_token_id", None)
    return pad_id if start is None else int(start)


def longest_prompt(config: PretrainedConfig) -> int | None:
    """Return how many tokens a prompt may have; None: positions are relative, and it may have any
    number.
    """
    return (
        None
        if (longest := longest_row(config)) is None
        else longest - (not config.is_encoder_decoder)
    )
