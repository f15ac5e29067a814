"""An engine that only computes, with a model's weights, of which each rank reads what it holds."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hfscale.checkpoint.pretrained import load_pretrained, match
from hfscale.checkpoint.weights import WeightsReader
from hfscale.config import schema
from hfscale.config.inference import Inference
from hfscale.dist.group import default_device
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import CheckpointError
from hfscale.models.build import accepted, construct
from hfscale.models.init import restore_buffers
from hfscale.models.kinds import BY_CLASS, ENCODER
from hfscale.run.origin import DTYPES, generate_as


@torch.no_grad()
def filled(
    config: PretrainedConfig,
    auto_model: str,
    reader: WeightsReader,
    how: Inference,
    *,
    name: str,
    folder: Path,
    precision: str,
    trust_remote_code: bool = False,
) -> InferenceEngine:
    """Return the model of ``config`` with the weights of ``reader``; it generates as ``folder``
    says.

    Raises:
        CheckpointError: if they lack a part of that class; ``name`` is what the user calls them.
    """

    def build(context: Callable[[], AbstractContextManager[object]]) -> PreTrainedModel:
        model = accepted(
            lambda: construct(
                config,
                auto_model,
                dtype=DTYPES[precision],
                attention=config._attn_implementation,
                trust_remote_code=trust_remote_code,
                context=context,
            ),
            schema.Model(pretrained=name),
        )
        restore_buffers(model)
        model.tie_weights()
        return model

    engine = InferenceEngine.create(build, how=how, precision=precision, device=default_device())
    generate_as(engine.module, folder)
    filling = match(engine.module, reader)
    if filling.missing and auto_model != ENCODER.auto_model:
        raise no_head(auto_model, name, filling.missing[:4])
    for fragment in engine.fragments():
        if fragment.name in filling.missing:  # BERT's pooler, say, on which no hidden state depends
            fragment.tensors["weight"].zero_()
    load_pretrained(engine, reader, filling)
    return engine


def no_head(wanted: str, name: str, value: object) -> CheckpointError:
    """Return the error of a model that lacks a part of the class ``wanted`` of transformers."""
    purpose, pretrained = BY_CLASS.get(wanted), ""
    if purpose and purpose.objective:
        pretrained = f", or for texts alone pretrain one with objective.name={purpose.objective}"
    return CheckpointError(
        f"this model has no head for the task: it is not one of {wanted}",
        where=name,
        value=value,
        remedy="fine-tune it for the task first: hfscale finetune CONFIG "
        f"{shlex.quote(f'model.pretrained={name}')}{pretrained}",
    )
