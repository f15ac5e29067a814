"""Random numbers of the data: drawn from (seed, position of the row), so never from ranks or from
how many draws came before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hfscale.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def row_generators(seed: int, position_B: Tensor) -> Iterator[np.random.Generator]:
    """Yield a generator for each row (B), which depends on the seed and the row's place in the
    run's order alone.

    Philox is counter-based (Salmon et al. 2011): a key is a stream of its own, and costs
    microseconds.
    """
    for position in position_B.tolist():
        yield np.random.Generator(np.random.Philox(key=[seed, position % 2**64]))


def random_state(state: list[Tensor] | None = None) -> list[Tensor]:
    """Return the state of torch's generators in use, after setting it to ``state`` if one is given.

    So a second pass over a micro-batch draws the dropout of the first.
    """
    if state is not None:
        torch.set_rng_state(state[0])
        for cuda in state[1:]:
            torch.cuda.set_rng_state(cuda)
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def special_id(tokenizer: PreTrainedTokenizerBase, role: str, *, why: str) -> int:
    """Return the id of the tokenizer's ``role`` (``mask_token``, ``cls_token``, ``pad_token``,
    ...).

    Raises:
        ConfigError: if it has none, with the command that adds one.
    """
    number = getattr(tokenizer, f"{role}_id", None)
    if number is None:
        short = role.removesuffix("_token")
        raise lacking(
            tokenizer, f"this tokenizer has no {short} token, {why}", add=f"{short}='<{short}>'"
        )
    return int(number)


def lacking(tokenizer: PreTrainedTokenizerBase, what: str, *, add: str) -> ConfigError:
    """Return the error of a tokenizer that needs more tokens, with the command that makes another
    one which has them.
    """
    path = tokenizer.name_or_path or "TOKENIZER"
    more = f"{path.rstrip('/')}-{add.partition('=')[0]}"
    command = (
        ""
        if Path(more).exists()
        else f"hfscale tokenizer add {quote(path)} {quote(more)} {add}\n  then "
    )
    return ConfigError(
        what,
        where="tokenizer.path",
        value=path,
        remedy=f"{command}set tokenizer.path={quote(more)}; shards that were built stay good",
    )
