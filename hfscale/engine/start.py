"""What comes before there is an engine: DeepSpeed on the process group that is up, the context in
which a model is made at ZeRO 3, and words for what DeepSpeed refuses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from hfscale.config.schema import TrainConfig
from hfscale.engine.ds_config import deepspeed_config, running_stage
from hfscale.engine.library import deepspeed
from hfscale.errors import ConfigError, UserError, lost_peer


def construction(config: TrainConfig, *, device_type: str) -> AbstractContextManager[Any]:
    """Return the context to build a transformers model in: at ZeRO 3 each parameter is partitioned
    as soon as its module exists.
    """
    if running_stage(config.engine) < 3:
        return nullcontext()
    join_process_group()
    asked = deepspeed_config(config, device_type=device_type)
    # hpZ's group is made by the first context of a process, and given to those that follow
    hpz = asked["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
    second = deepspeed.utils.groups._get_zero_param_intra_parallel_group() if hpz else None
    with extra_named(config):
        context: AbstractContextManager[Any] = deepspeed.zero.Init(
            config_dict_or_path=asked, zero_param_parallel_group=second
        )
    return context


def gathered(
    params: Iterable[nn.Parameter], *, modify: bool = False
) -> AbstractContextManager[Any]:
    """Return a context in which ``params`` are whole on every rank. All ranks must enter; with
    ``modify`` rank 0's values stay.
    """
    split = [param for param in params if hasattr(param, "ds_id")]
    return (
        deepspeed.zero.GatheredParameters(split, modifier_rank=0 if modify else None)
        if split
        else nullcontext()
    )


def join_process_group() -> None:
    """Let DeepSpeed use the process group that is up. Its shared-memory kernel serves inference
    only, and wants a compiler.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    # DeepSpeed's calls
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message="`torch.distributed.*is deprecated"
    )


@contextmanager
def extra_named(config: TrainConfig) -> Iterator[None]:
    """Have what DeepSpeed says against an option name ``engine.extra``, where there is one."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it asserts, and raises whatever lies near
        if not config.engine.extra or lost_peer(error):
            raise
        said = " ".join(str(error).split())
        raise ConfigError(
            f"DeepSpeed cannot start with these options: {type(error).__name__}: {said[:300]}",
            where="engine.extra",
            value=config.engine.extra,
            remedy="take out what its words name; without engine.extra it starts",
        ) from error
