"""The proof of an export: loaded by transformers, it answers a probe as the training engine did."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hfscale.checkpoint import layout
from hfscale.checkpoint.export import compare_logits
from hfscale.checkpoint.probe import read_probe
from hfscale.config.schema import TrainConfig
from hfscale.dist.group import default_device, device_name
from hfscale.models.call import live
from hfscale.objectives.base import Objective
from hfscale.run.model import check_live

# relative L2 difference of logits that rounding explains: on the run's kind of device, and on
# another (other kernels, TF32)
# 3e-3 was seen in bf16: ZeRO 3 hands weights to kernels at other addresses
SAME_DEVICE = {
    "fp32": 1e-5,
    "bf16": 1e-2,
    "fp16": 2e-3,
}
OTHER_DEVICE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
ROOM = 2**30  # bytes of a GPU beside the weights: kernels, activations


def prove(
    folder: Path,
    objective: Objective,
    *,
    skeleton: PreTrainedModel,
    checkpoint: Path,
    config: TrainConfig,
    load: Callable[[Path], torch.nn.Module] | None = None,
) -> float:
    """Return the relative difference between the engine's logits at the save of ``checkpoint`` and
    those of ``folder``, loaded by transformers unless ``load`` loads it.

    Raises:
        CheckpointError: if they differ by more than rounding explains.
        ConfigError: if training with ``objective`` would refuse what was loaded.
    """
    device, attention = default_device(), skeleton.config._attn_implementation
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.type == "cuda" and size + ROOM > torch.cuda.mem_get_info()[0]:
        # where files are mapped: a model larger than the memory is slow there, but goes
        device, attention = torch.device("cpu"), None
    model: torch.nn.Module
    if load:
        model = load(folder)
    else:
        model = type(skeleton).from_pretrained(
            folder, dtype=skeleton.dtype, attn_implementation=attention, use_safetensors=True
        )
    model.to(device).eval()
    objective = copy(objective)  # the run may train with it
    objective.setting = replace(objective.setting, model_config=live(model).config)
    check_live(objective, model, device=device, said=config.model)
    probe = read_probe(checkpoint)
    with torch.no_grad():
        got = probe.ask(model, device=device)
    assert got is not None, "it had logits when it was saved"
    plain = not config.engine.compile and not config.model.lora
    same = plain and device_name(device) == layout.state_of(checkpoint).device
    tolerance = (SAME_DEVICE if same else OTHER_DEVICE)[config.engine.precision]
    return compare_logits(got, probe.logits, tolerance=tolerance)
