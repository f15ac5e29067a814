"""The peers' data: a flat memory map of rows in training order, which is as cheap as reading data
gets. Also their models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def read_work() -> dict[str, Any]:
    """Return the work file that the command line names."""
    return json.loads(Path(sys.argv[1]).read_text())


def micro_batches(
    work: dict[str, Any], *, rank: int, world_size: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield this rank's ids (micro_batch, seq_len + 1), int64 on ``device``, for ever."""
    rows = np.memmap(work["rows"], work["dtype"], "r").reshape(-1, work["seq_len"] + 1)
    share, micro = work["micro_batch"] * work["accumulation"], work["micro_batch"]
    steps = len(rows) // (share * world_size)
    while True:
        for step in range(steps):
            first = (step * world_size + rank) * share
            for start in range(first, first + share, micro):
                ids = torch.from_numpy(rows[start : start + micro].astype(np.int64))
                yield (
                    ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids
                )


def model_of(work: dict[str, Any]) -> PreTrainedModel:
    """Return the model in fp32, with the weights in its folder, or new ones where there are
    none.
    """
    if any(Path(work["model"]).glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(work["model"]), dtype=torch.float32
    )


def adamw_of(model: torch.nn.Module, work: dict[str, Any]) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only."""
    groups = [
        {
            "params": [p for p in model.parameters() if p.ndim >= 2],
            "weight_decay": work["weight_decay"],
        },
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=work["lr"], betas=work["betas"], eps=work["eps"], fused=True
    )


def build_nothing() -> None:
    """Keep DeepSpeed from compiling its CPU kernel for inference, which training does not use: a
    killed build leaves a lock for ever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
