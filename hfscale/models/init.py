"""First weights that depend on the seed and the module's path alone.

A plain build and a ZeRO 3 build draw in different orders, devices and precisions, so transformers'
own numbers differ between them (and bare ``zero.Init`` leaves torch's defaults: GPT-2 then starts
at loss 124 instead of 9). Here, at every stage alike: modules are walked children first, each
module's own and direct children's parameters are gathered, their data is exchanged for fp32 on the
CPU, torch is seeded with sha256(seed, path), the architecture's ``_init_weights`` draws, and the
numbers are copied back. No rank ever holds more than one module's part. Source: transformers'
``initialize_weights_zero3`` (the walk).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import nn
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions, no_init_weights

from hfscale.errors import ConfigError
from hfscale.models.adapters import pairs

# makes parameters whole, and keeps what rank 0 wrote
Gather = Callable[[Sequence[Parameter]], AbstractContextManager[object]]


def initialize(model: PreTrainedModel, *, seed: int, gather: Gather | None = None) -> list[str]:
    """Return the names of parameters that the architecture leaves undrawn (they are NaN); all
    others are drawn, then tied.

    Every rank must call this alike: gathering is collective. torch's global generator is left as it
    was.

    Raises:
        ConfigError: for an architecture whose initialization reaches parameters that the walk does
            not gather.
    """
    restore_buffers(model)
    undrawn = set(model.parameters())
    with torch.no_grad(), guard_torch_init_functions(), torch.random.fork_rng(devices=[]):
        for path, module, owner in _children_first("", model, model):
            near = _near(path, module, model.all_tied_weights_keys)
            far = {p: p._version for p in module.parameters() if p not in near}
            with (
                gather(list(near)) if gather and near else nullcontext(),
                _fp32_on_cpu(list(near), undrawn),
            ):
                for thing in (module, *module.buffers(recurse=False)):
                    thing._is_hf_initialized = False  # type: ignore[attr-defined]
                for p, is_copy in near.items():
                    p._is_hf_initialized = is_copy  # type: ignore[attr-defined]
                torch.default_generator.manual_seed(_seed(seed, path))
                owner._init_weights(module)
                own = [p for p in module.parameters(recurse=False) if not near[p]]
                if (
                    own
                    and all(p.isnan().all() for p in own)
                    and callable(reset := getattr(module, "reset_parameters", None))
                ):
                    # a torch module that the architecture leaves to torch (openai-gpt's norms)
                    reset()
            reached = [p for p, version in far.items() if p._version != version]
            if any(hasattr(p, "ds_id") for p in reached):  # it is in parts
                raise ConfigError(
                    f"the first weights of {path or 'the model'} reach deeper than its direct "
                    "children, where ZeRO 3 has only parts",
                    where="engine.zero_stage",
                    value=type(module).__name__,
                    remedy="set engine.zero_stage=2, or choose another architecture",
                )
    model.tie_weights()
    return [name for name, p in model.named_parameters() if p in undrawn]


def initialize_adapters(model: PreTrainedModel, *, seed: int, gather: Gather | None = None) -> None:
    """Return with A of each LoRA adapter drawn as peft does (uniform, like a linear module of
    torch) and B zero.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for path, pair in pairs(model):
            with gather(pair) if gather else nullcontext(), _fp32_on_cpu(pair, set()):
                torch.default_generator.manual_seed(_seed(seed, path))
                nn.init.kaiming_uniform_(pair[0], a=math.sqrt(5))
                nn.init.zeros_(pair[1])


def _near(path: str, module: nn.Module, tied: Mapping[str, str]) -> dict[Parameter, bool]:
    """Return the module's own and direct children's parameters; True = a copy by a tie, which
    another module draws.

    Judged by name, since only transformers' own ZeRO 3 build is tied already; one that has its own
    name here too is no copy.
    """
    near: dict[Parameter, bool] = {}
    for name, p in module.named_parameters(prefix=path, remove_duplicate=False):
        if name.removeprefix(f"{path}.").count(".") <= 1:
            near[p] = near.get(p, True) and name in tied
    return near


def _children_first(
    path: str, module: nn.Module, owner: PreTrainedModel
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Yield (path, module, the model whose ``_init_weights`` is in charge of it)."""
    for name, child in module.named_children():
        yield from _children_first(
            f"{path}.{name}" if path else name,
            child,
            child if isinstance(child, PreTrainedModel) else owner,
        )
    yield path, module, owner


@contextmanager
def _fp32_on_cpu(params: list[Parameter], undrawn: set[Parameter]) -> Iterator[None]:
    """Exchange the parameters' data for fp32 on the CPU, NaN where nothing was drawn yet, and copy
    it back at the end.

    What nobody draws keeps its constructor's value where that is a constant vector (a zero bias);
    anything else stays NaN.
    """
    homes = {p: p.data for p in params}
    for p, home in homes.items():
        p.data = (
            torch.full(home.shape, torch.nan, device="cpu")
            if p in undrawn
            else home.to("cpu", torch.float32, copy=True)
        )
    yield
    for p, home in homes.items():
        if not p.data.sum().isnan():
            undrawn.discard(p)
            home.copy_(p.data)
        elif p.dim() < 2 and home.min() == home.max():
            undrawn.discard(p)
        else:
            home.fill_(torch.nan)
        p.data = home


def restore_buffers(model: PreTrainedModel) -> None:
    """Give float buffers (rotary frequencies) the precision that a plain fp32 build gives them.

    A build in 16 bits, or in ZeRO 3's context, makes all of them alike. Where the architecture
    itself chose 16 bits (recurrent_gemma's ``normalizer``) an export is loaded with them so.
    """
    with torch.device("meta"), no_init_weights():
        plain = dict(type(model)(deepcopy(model.config)).named_buffers())
    for path, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            built = plain.get(f"{path}.{name}" if path else name)
            if buffer.is_floating_point() and built is not None:
                setattr(module, name, buffer.to(built.dtype))


def _seed(seed: int, path: str) -> int:
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
