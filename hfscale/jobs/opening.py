"""The weights of a MODEL by name, whatever kind of place that is: a run, a checkpoint, an export, a
transformers folder, a hub name.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from hfscale.checkpoint import layout
from hfscale.checkpoint.pretrained import load_pretrained, match
from hfscale.checkpoint.weights import (
    WeightsReader,
    open_weights,
    refuse_adapter,
    verify_together,
)
from hfscale.config.inference import Inference, PredictConfig
from hfscale.config.schema import Model, TrainConfig
from hfscale.dist.group import default_device
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import CheckpointError, ConfigError, UserError, lost_peer
from hfscale.hub import foreign_code, local_folder
from hfscale.jobs.asked import brings_code, objective_of
from hfscale.jobs.material import run_config
from hfscale.jobs.origin import DTYPES, generate_as, model_needs, skeleton
from hfscale.models.build import (
    accepted,
    check_head,
    check_model_config,
    construct,
    first_line,
    longest_row,
    read_config,
)
from hfscale.models.init import restore_buffers
from hfscale.models.kinds import BY_CLASS
from hfscale.objectives.base import Objective, Setting, check_options
from hfscale.tasks.base import Task, task_class
from hfscale.tokenizer import load_tokenizer, quiet


@dataclass(frozen=True)
class RunModel:
    """A checkpoint of a run: ``skeleton`` has shapes and precision (meta device), ``reader`` the
    weights, verified.
    """

    config: TrainConfig
    objective: Objective  # or a task
    checkpoint: Path
    skeleton: PreTrainedModel
    reader: WeightsReader
    tokenizer: PreTrainedTokenizerFast

    def engine(
        self, how: Inference = Inference(), *, auto_model: str | None = None
    ) -> InferenceEngine:
        """Return the model with its weights; ``auto_model``: as another class of transformers has
        it.
        """
        return _filled(
            self.skeleton.config,
            auto_model or self.objective.auto_model,
            self.reader,
            how,
            folder=self.checkpoint,
            precision=how.precision or self.config.engine.precision,
            attention=self.skeleton.config._attn_implementation,
            trust_remote_code=self.config.model.trust_remote_code,
        )


def open_run(name: str) -> RunModel | None:
    """Return the checkpoint that ``name`` stands for (of a run: its newest), or None if it is
    nothing of ours. Collective, in a group.

    Raises:
        CheckpointError: if it is a run without a checkpoint, or one whose files do not match its
            manifest.
    """
    disable_progress_bar()
    if (checkpoint := layout.checkpoint_of(name)) is None:
        return None
    reader = open_weights(
        checkpoint, check=verify_together
    )  # damaged ones are refused: silently taking an older one would be a lie
    config = run_config(checkpoint)
    objective = objective_of(config, checkpoint)
    tokenizer = objective.setting.tokenizer
    model_config = check_model_config(**model_needs(config, tokenizer, checkpoint))
    shapes = skeleton(config, model_config, objective.auto_model)
    generate_as(shapes, checkpoint)
    return RunModel(config, objective, checkpoint, shapes, reader, tokenizer)


@dataclass(frozen=True)
class Opened:
    """A model that can be asked."""

    engine: InferenceEngine
    tokenizer: PreTrainedTokenizerFast  # as an export of it has it
    facts: Mapping[str, Any]  # what its run knows of its task


def open_model(name: str, auto_model: str, how: Inference) -> Opened:
    """Return MODEL ``name`` as that class of transformers, on the GPU if there is one. Collective
    at ZeRO stage 3.

    Raises:
        UserError: if there is no such model, or its weights lack a part of that class.
    """
    if run := open_run(name):
        if auto_model not in ("AutoModel", run.objective.auto_model):
            raise _no_head(auto_model, name, type(run.skeleton).__name__)
        engine = run.engine(how, auto_model=auto_model)
        return Opened(
            engine,
            framed(run.tokenizer, run.objective.frame, engine.module.config),
            run.objective.setting.facts,
        )
    disable_progress_bar()
    folder = local_folder(
        name,
        where="MODEL",
        weights=True,
        remedy="name a run, a checkpoint, an export, a transformers folder",
    )
    try:
        refuse_adapter(folder)
        config = read_config(folder, where="MODEL")
        saved = next(
            (precision for precision, dtype in DTYPES.items() if dtype == config.dtype), "fp32"
        )
        precision: str = how.precision or saved
        if how.zero_stage == 3:
            check_head(config, auto_model)
            engine = _filled(
                config, auto_model, open_weights(folder), how, folder=folder, precision=precision
            )
            return Opened(engine, load_tokenizer(folder), {})
        with quiet():  # its report of what is missing; we say it
            model, found = getattr(transformers, auto_model).from_pretrained(
                folder,
                dtype=DTYPES[precision],
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except UserError:
        raise
    except Exception as error:  # whatever an architecture says of sizes and weights that do not fit
        if lost_peer(error):
            raise
        if foreign_code(error):
            raise brings_code(name) from error
        raise CheckpointError(
            "no model for this task here",
            where=name,
            value=first_line(error),
            remedy=f"name a run, a checkpoint, an export, or a folder that {auto_model} loads",
        ) from error
    if auto_model != "AutoModel" and found["missing_keys"]:
        raise _no_head(auto_model, name, sorted(found["missing_keys"])[:4])
    return Opened(InferenceEngine(model, device=default_device()), load_tokenizer(folder), {})


@torch.no_grad()
def _filled(
    config: PretrainedConfig,
    auto_model: str,
    reader: WeightsReader,
    how: Inference,
    *,
    folder: Path,
    precision: str,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> InferenceEngine:
    """Return the model of ``config`` with the weights of ``reader``, of which each rank reads what
    it holds.
    """

    def build(context: Callable[[], AbstractContextManager[Any]]) -> PreTrainedModel:
        model = accepted(
            lambda: construct(
                config,
                auto_model,
                dtype=DTYPES[precision],
                attention=attention,
                trust_remote_code=trust_remote_code,
                context=context,
            ),
            Model(pretrained=str(folder)),
        )
        restore_buffers(model)
        model.tie_weights()
        return model

    engine = InferenceEngine.create(build, how=how, precision=precision, device=default_device())
    generate_as(engine.module, folder)
    found = match(engine.module, reader)
    if found.missing and auto_model != "AutoModel":
        raise _no_head(auto_model, str(folder), found.missing[:4])
    for fragment in engine.fragments():
        if fragment.name in found.missing:  # BERT's pooler, say, on which no hidden state depends
            fragment.tensors["weight"].zero_()
    load_pretrained(engine, reader, found)
    return engine


def open_task(config: PredictConfig) -> tuple[InferenceEngine, Task]:
    """Return the model that predicts, and its task.

    Raises:
        UserError: if there is no such model, it has no head for the task, or training would refuse
            it.
    """
    kind, length = task_class(config.task.name), config.data.max_length
    options = check_options(kind.Options, config.task.options, where="task.options")
    opened = open_model(
        config.predict.model, kind(options, Setting(seq_len=length)).auto_model, config.engine
    )
    model_config = opened.engine.module.config
    if (longest := longest_row(model_config)) is not None and length > longest:
        raise ConfigError(
            "texts may be longer than the model can read",
            where="data.max_length",
            value=length,
            remedy=f"data.max_length={longest} or less",
        )
    task = kind(
        options,
        Setting(
            seq_len=length,
            tokenizer=opened.tokenizer,
            model_config=model_config,
            facts=opened.facts or kind.known(model_config),
        ),
    )
    task.check(opened.engine, device=opened.engine.device)
    return opened.engine, task


def framed(
    tokenizer: PreTrainedTokenizerFast,
    frame: tuple[str | None, ...] | None,
    config: PretrainedConfig,
) -> PreTrainedTokenizerFast:
    """Return the tokenizer, giving what such a model was trained on: tokens of the roles ``frame``
    before a text and after it.

    Where there is no ``eos_token`` documents end with the ``sep_token``. Without any role nothing
    is put, as shards are made: a prompt that ends in [SEP] would be a document's end. None: what
    the tokenizer puts itself.
    """
    if not getattr(config, "type_vocab_size", 0):
        tokenizer.model_input_names = [
            name for name in tokenizer.model_input_names if name != "token_type_ids"
        ]
    if frame is None:
        return tokenizer
    bare, ends = (
        tokenizer("a", add_special_tokens=False)["input_ids"],
        {"eos_token": tokenizer.eos_token or tokenizer.sep_token},
    )
    has = [role and ends.get(role, getattr(tokenizer, role)) for role in frame]
    puts, own = tokenizer("a")["input_ids"], tokenizer.backend_tokenizer.post_processor
    ends_itself = bool(frame) and frame[-1] is None and puts[-1:] != bare[-1:]
    if not frame and puts != bare:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    elif any(has) and (puts == bare or ends_itself):
        before, after = (f"{token} " if token else "" for token in has)
        around = processors.TemplateProcessing(
            single=f"{before}$A {after}".strip(),
            pair=f"{before}$A {after}$B {after}".strip(),
            special_tokens=[
                (token, tokenizer.convert_tokens_to_ids(token)) for token in has if token
            ],
        )
        tokenizer.backend_tokenizer.post_processor = (
            processors.Sequence([own, around]) if own and not ends_itself else around
        )
    return tokenizer


def _no_head(wanted: str, name: str, value: Any) -> CheckpointError:
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
