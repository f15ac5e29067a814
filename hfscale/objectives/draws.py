"""Random numbers of the data: drawn from (seed, position of the row), so never from ranks or from how many draws came before."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from hfscale.errors import ConfigError


def row_generators(seed: int, position_B: Tensor) -> Iterator[np.random.Generator]:
    """Yield a generator for each row (B), which depends on the seed and the row's place in the run's order alone.

    Philox is counter-based (Salmon et al. 2011): a key is a stream of its own, and costs microseconds.
    """
    for position in position_B.tolist():
        yield np.random.Generator(np.random.Philox(key=[seed, position % 2**64]))


def special_id(tokenizer: object, role: str, *, why: str) -> int:
    """Return the id of the tokenizer's ``role`` (``mask_token``, ``cls_token``, ``pad_token``, ...).

    Raises:
        ConfigError: if it has none, with the command that adds one.
    """
    number = getattr(tokenizer, f"{role}_id", None)
    if number is None:
        name = getattr(tokenizer, "name_or_path", "TOKENIZER")
        raise ConfigError(f"this tokenizer has no {role.replace('_', ' ')}, {why}", where="tokenizer.path", value=name,
                          remedy=f"hfscale tokenizer add {name} OUT {role}='<{role.removesuffix('_token')}>', then tokenizer.path=OUT; "
                                 "shards that were built stay good")
    return int(number)
