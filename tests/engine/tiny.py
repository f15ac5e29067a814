"""A tiny GPT-2 under the engine, and steps on rows that depend on nothing but the step: used by
tests of engine and checkpoint.

Every step has GLOBAL_ROWS rows with unequal numbers of counted tokens, whatever the number of
ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F

from hfscale.config.rules import Length
from hfscale.config.schema import RunConfig
from hfscale.engine.engine import Allow, Engine, StepStats
from hfscale.engine.schedule import learning_rate

VOCAB, TOKENS, GLOBAL_ROWS, TOTAL_STEPS = 97, 16, 8, 12


def tiny_config(
    stage: int = 1,
    precision: str = "fp32",
    *,
    world_size: int = 1,
    accumulation: int = 2,
    clip_norm: float = 0.5,
    optim: dict[str, Any] | None = None,
    **engine: Any,
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "tiny"},
            "tokenizer": {"path": "none"},
            "data": {"seq_len": TOKENS, "sources": [{"shards": "none"}]},
            "model": {"architecture": "gpt2"},
            "objective": {"name": "clm"},
            "optim": {"lr": 0.01, "clip_norm": clip_norm, **(optim or {})},
            "schedule": {"warmup_steps": 3},
            "train": {
                "steps": TOTAL_STEPS,
                "global_batch": GLOBAL_ROWS,
                "micro_batch": GLOBAL_ROWS // world_size // accumulation,
            },
            "engine": {"zero_stage": stage, "precision": precision, **engine},
        }
    )


def tiny_model(dropout: float = 0.0) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=TOKENS,
            n_embd=24,
            n_layer=2,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def tiny_engine(config: RunConfig, dropout: float = 0.0) -> Engine:
    return Engine.create(tiny_model(dropout), config=config, device=torch.device("cpu"))


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(ids_BT, counted_BT)`` of the global step. The ids follow a rule that a model can
    learn.
    """
    rng = torch.Generator().manual_seed(step)
    start = torch.randint(13, (GLOBAL_ROWS, 1), generator=rng)
    ids = (start + torch.arange(TOKENS)) % 13
    return ids, torch.rand(ids.shape, generator=rng) < torch.linspace(0.3, 1.0, GLOBAL_ROWS)[
        :, None
    ]


def train_step(
    engine: Engine, config: RunConfig, step: int, *, allow: Allow | None = None
) -> tuple[float, StepStats]:
    """Return the global mean loss before update ``step``, and what the update did."""
    ids, counted = rows(step)
    count = counted[:, 1:].sum()
    mine = slice(
        engine.all.rank * GLOBAL_ROWS // engine.all.size,
        (engine.all.rank + 1) * GLOBAL_ROWS // engine.all.size,
    )
    total = torch.zeros(())
    batches = zip(
        ids[mine].split(config.train.micro_batch),
        counted[mine].split(config.train.micro_batch),
        strict=True,
    )
    for number, (micro, asked) in enumerate(batches):
        torch.manual_seed(step * 1000 + engine.all.rank * 100 + number)  # dropout
        logits = engine(input_ids=micro).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), micro[:, 1:].flatten(), reduction="none")
        loss = (losses * asked[:, 1:].flatten()).sum()
        total += loss.detach()
        engine.backward(loss * engine.all.size / count)
    torch_dist.all_reduce(total)
    return (total / count).item(), engine.step(rate(config, step), allow=allow)


def rate(config: RunConfig, step: int) -> float:
    return learning_rate(
        step, peak=config.optim.lr, length=Length(TOTAL_STEPS), schedule=config.schedule
    )


def logits(engine: Engine) -> torch.Tensor:
    with engine.eval_mode():
        return engine(input_ids=rows(0)[0]).logits.float().clone()


def full_state(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    """Return every tensor of the model and optimizer, whole, put together from the fragments of all
    ranks.
    """
    mine = [
        (f.name, f.shape, f.start, {key: value.clone() for key, value in f.tensors.items()})
        for f in engine.fragments()
    ]
    everyone: list[Any] = [None] * engine.all.size
    torch_dist.all_gather_object(everyone, mine)
    state: dict[str, dict[str, torch.Tensor]] = {}
    seen: dict[str, torch.Tensor] = {}
    for name, shape, start, tensors in (fragment for rank in everyone for fragment in rank):
        numel = int(torch.Size(shape).numel())
        for key, value in tensors.items():
            stop = start + value.numel()
            state.setdefault(name, {}).setdefault(key, torch.empty(numel, dtype=value.dtype))[
                start:stop
            ] = value
            times = seen.setdefault(f"{name}.{key}", torch.zeros(numel))
            times[start:stop] += 1
    wrong = [name for name, times in seen.items() if not (times == 1).all()]
    assert not wrong, f"not covered exactly once: {wrong}"
    return state


def same(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> list[str]:
    """Return the names of tensors that differ in any bit."""
    assert a.keys() == b.keys()
    return [
        f"{name}.{key}"
        for name in a
        for key in a[name]
        if not torch.equal(a[name][key], b[name][key])
    ]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def accumulation_error(stage: int, micro_batches: int) -> float:
    """Return how far the gradient of a bf16 step is from a float64 sum of the same bf16
    micro-gradients, relative to it.
    """
    config = tiny_config(
        stage, "bf16", world_size=torch_dist.get_world_size(), accumulation=1, clip_norm=0
    )
    engine = tiny_engine(config)
    rng = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCAB, (engine.all.size, micro_batches, 1, TOKENS), generator=rng)
    for row in ids[engine.all.rank]:
        engine.backward(_mean_loss(engine, row) / micro_batches)
    engine.step(0.0)
    moments = full_state(engine)
    engine.close()
    alone = tiny_model().bfloat16()
    totals = {
        name: torch.zeros(p.shape, dtype=torch.float64) for name, p in alone.named_parameters()
    }
    for row in ids.flatten(0, 1):
        alone.zero_grad()
        (_mean_loss(alone, row) / micro_batches).backward()
        for name, param in alone.named_parameters():
            totals[name] += param.grad.double() / len(ids)
    beta = config.optim.betas[0]
    seen = torch.cat([moments[name]["exp_avg"].double() / (1 - beta) for name in totals])
    right = torch.cat([total.flatten() for total in totals.values()])
    return ((seen - right).norm() / right.norm()).item()


def _mean_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, 1:])
