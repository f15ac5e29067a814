"""A model by name, whatever kind of place that is: a run, one of its checkpoints, an export, a transformers folder, a hub name."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import processors
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from hfscale.checkpoint import layout
from hfscale.checkpoint.pretrained import load_pretrained, match
from hfscale.checkpoint.weights import WeightsReader, open_weights, verify_together
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.inference import Inference, PredictConfig
from hfscale.config.load import load_config, load_values
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.dist.group import default_device
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import CheckpointError, ConfigError
from hfscale.hub import local_folder
from hfscale.jobs.check import DTYPES, model_needs, skeleton
from hfscale.jobs.material import tokenizer_folder
from hfscale.models.build import check_head, check_model_config, construct, first_position
from hfscale.models.init import float_buffers_to_fp32
from hfscale.objectives.base import Objective, Setting, check_options, load_objective
from hfscale.tasks.base import TASKS, Task, load_task, task_class
from hfscale.tokenizer import load_tokenizer


@dataclass(frozen=True)
class RunModel:
    """A checkpoint of a run: ``skeleton`` has shapes and precision (meta device), ``reader`` the weights, verified."""

    config: TrainConfig
    objective: Objective  # or a task
    checkpoint: Path
    skeleton: PreTrainedModel
    reader: WeightsReader
    tokenizer: PreTrainedTokenizerFast

    def engine(self, how: Inference = Inference(), *, auto_model: str | None = None) -> InferenceEngine:
        """Return the model with its weights; ``auto_model``: as another class of transformers has it."""
        return _filled(self.skeleton.config, auto_model or self.objective.auto_model, self.reader, how, where=str(self.checkpoint),
                       precision=how.precision or self.config.engine.precision, attention=self.skeleton.config._attn_implementation,
                       trust_remote_code=self.config.model.trust_remote_code)


def open_run(name: str) -> RunModel | None:
    """Return the checkpoint that ``name`` stands for (of a run: its newest), or None if it is nothing of ours. Collective, in a group.

    Raises:
        CheckpointError: if it is a run without a checkpoint, or one whose files do not match its manifest.
    """
    disable_progress_bar()
    if (checkpoint := layout.checkpoint_of(name)) is None:
        return None
    reader = open_weights(checkpoint, check=verify_together)  # damaged ones are refused: silently taking an older one would be a lie
    config = run_config(checkpoint)
    objective = _objective(config, checkpoint)
    tokenizer = objective.setting.tokenizer
    model_config = check_model_config(**model_needs(config, tokenizer, checkpoint))
    return RunModel(config, objective, checkpoint, skeleton(config, model_config, objective.auto_model), reader, tokenizer)


def _objective(config: TrainConfig, checkpoint: Path) -> Objective:
    """Return the objective or task of a run, with what its training examples said."""
    facts = json.loads((checkpoint / layout.STATE).read_text("utf-8")).get("facts", {})
    setting = Setting(seq_len=config.data.seq_len, tokenizer=load_tokenizer(tokenizer_folder(config, None)), facts=facts)
    if isinstance(config, FinetuneConfig):
        return load_task(config.task, setting)
    assert isinstance(config, RunConfig)
    return load_objective(config.objective, setting)


@dataclass(frozen=True)
class Opened:
    """A model that can be asked."""

    engine: InferenceEngine
    tokenizer: PreTrainedTokenizerFast  # as an export of it has it
    facts: Mapping[str, Any]  # what its run knows of its task


def open_model(name: str, auto_model: str, how: Inference) -> Opened:
    """Return MODEL ``name`` as that class of transformers, on the GPU if there is one. Collective at ZeRO stage 3.

    Raises:
        UserError: if there is no such model, or its weights lack a part of that class.
    """
    if run := open_run(name):
        if auto_model not in ("AutoModel", run.objective.auto_model):
            raise _no_head(auto_model, name, type(run.skeleton).__name__)
        engine = run.engine(how, auto_model=auto_model)
        return Opened(engine, framed(run.tokenizer, run.objective.frame, engine.module.config), run.objective.setting.facts)
    disable_progress_bar()
    folder = local_folder(name, where="MODEL", weights=True, remedy="name a run, a checkpoint, an export, a transformers folder")
    try:
        config = AutoConfig.from_pretrained(folder)
        saved = next((precision for precision, dtype in DTYPES.items() if dtype == config.dtype), "fp32")
        precision: str = how.precision or saved
        if how.zero_stage == 3:
            check_head(config, auto_model)
            engine = _filled(config, auto_model, open_weights(folder), how, where=name, precision=precision)
            return Opened(engine, load_tokenizer(folder), {})
        model, found = getattr(transformers, auto_model).from_pretrained(folder, dtype=DTYPES[precision], output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError("no model for this task here", where=name, value=str(error).splitlines()[0],
                              remedy=f"name a run, a checkpoint, an export, or a folder that {auto_model} loads") from error
    if auto_model != "AutoModel" and found["missing_keys"]:
        raise _no_head(auto_model, name, sorted(found["missing_keys"])[:4])
    return Opened(InferenceEngine(model, device=default_device()), load_tokenizer(folder), {})


@torch.no_grad()
def _filled(config: PretrainedConfig, auto_model: str, reader: WeightsReader, how: Inference, *, where: str, precision: str,
            attention: str | None = None, trust_remote_code: bool = False) -> InferenceEngine:
    """Return the model of ``config`` with the weights of ``reader``, of which each rank reads what it holds."""

    def build(context: Callable[[], AbstractContextManager[Any]]) -> PreTrainedModel:
        model = construct(config, auto_model, dtype=DTYPES[precision], attention=attention, trust_remote_code=trust_remote_code,
                          context=context)
        float_buffers_to_fp32(model)
        model.tie_weights()
        return model

    engine = InferenceEngine.create(build, how=how, precision=precision, device=default_device())
    found = match(engine.module, reader)
    if found.missing and auto_model != "AutoModel":
        raise _no_head(auto_model, where, found.missing[:4])
    for fragment in engine.fragments():
        if fragment.name in found.missing:  # BERT's pooler, say, on which no hidden state depends
            fragment.tensors["weight"].zero_()
    load_pretrained(engine, reader, found)
    return engine


def open_task(config: PredictConfig) -> tuple[InferenceEngine, Task]:
    """Return the model that predicts, and its task.

    Raises:
        UserError: if there is no such model, or it has no head for the task.
    """
    kind, length = task_class(config.task.name), config.data.max_length
    options = check_options(kind.Options, config.task.options, where="task.options")
    opened = open_model(config.predict.model, kind(options, Setting(seq_len=length)).auto_model, config.engine)
    model_config = opened.engine.module.config
    return opened.engine, kind(options, Setting(seq_len=length, tokenizer=opened.tokenizer, model_config=model_config,
                                                facts=opened.facts or kind.known(model_config)))


def framed(tokenizer: PreTrainedTokenizerFast, frame: tuple[str | None, ...] | None, config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Return the tokenizer, giving what such a model was trained on: tokens of the roles ``frame`` before a text and after it.

    Where there is no ``eos_token`` documents end with the ``sep_token``. Without any role nothing is put, as shards are made: a prompt
    that ends in [SEP] would be a document's end. None: what the tokenizer puts itself.
    """
    if not getattr(config, "type_vocab_size", 0):
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    if frame is None:
        return tokenizer
    bare, ends = tokenizer("a", add_special_tokens=False)["input_ids"], {"eos_token": tokenizer.eos_token or tokenizer.sep_token}
    has = [role and ends.get(role, getattr(tokenizer, role)) for role in frame]
    if not frame and tokenizer("a")["input_ids"] != bare:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    elif any(has) and tokenizer("a")["input_ids"] == bare:
        before, after = (f"{token} " if token else "" for token in has)
        around = processors.TemplateProcessing(
            single=f"{before}$A {after}".strip(), pair=f"{before}$A {after}$B {after}".strip(),
            special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in has if token])
        own = tokenizer.backend_tokenizer.post_processor
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([own, around]) if own else around
    return tokenizer


def _no_head(wanted: str, name: str, value: Any) -> CheckpointError:
    return CheckpointError(f"this model has no head for the task: it is not one of {wanted}", where=name, value=value,
                           remedy=f"fine-tune it first: hfscale finetune CONFIG model.pretrained={name}")


SUGGESTED = {"ForSequenceClassification": "sequence_classification", "ForTokenClassification": "token_classification",
             "ForQuestionAnswering": "extractive_qa", "ForMaskedLM": "fill_mask", "ForCausalLM": "text_generation",
             "LMHeadModel": "text_generation"}  # end of an architecture's name -> task
CLASSES = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM",
           "ForConditionalGeneration": "AutoModelForSeq2SeqLM"}
OF_OBJECTIVES = {"clm": "text_generation", "mlm": "fill_mask", "contrastive": "feature_extraction"}


def auto_model_of(name: str) -> str:
    """Return the class of transformers that MODEL ``name`` is one of; its own name, where it writes no text."""
    if checkpoint := layout.checkpoint_of(name):
        return _objective(run_config(checkpoint), checkpoint).auto_model
    architecture = (model_and_tokenizer(name)[0].architectures or [""])[0]
    return next((kind for end, kind in CLASSES.items() if architecture.endswith(end)), architecture)


def model_and_tokenizer(name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """Return the config and tokenizer of MODEL ``name``; nothing is read of the weights."""
    if checkpoint := layout.checkpoint_of(name):
        return AutoConfig.from_pretrained(checkpoint), load_tokenizer(tokenizer_folder(run_config(checkpoint), None))
    folder = local_folder(name, where="MODEL", remedy="name a run, a checkpoint, an export, a transformers folder")
    try:
        return AutoConfig.from_pretrained(folder), load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError("no model here", where=name, value=str(error).splitlines()[0],
                              remedy="name a run, a checkpoint, an export, or a transformers folder") from error


def is_pretraining(name: str, data: str | None) -> bool:
    """Return whether MODEL ``name`` is to be evaluated on shards, where no task is named."""
    if data is not None:
        return (Path(data) / "manifest.json").is_file() or Path(data).name == "manifest.json"
    checkpoint = layout.checkpoint_of(name)
    return checkpoint is not None and isinstance(run_config(checkpoint), RunConfig)


def settle(name: str | None, *, task: str | None, data: str | None, out: Path, overrides: Sequence[str],
           answers: bool = False) -> PredictConfig:
    """Return what predicting with MODEL ``name`` means: as its run was trained, or as its architecture suggests; ``overrides`` go on top.

    Without a name there are predictions already. An override is of a section (``data.columns.text=review``), or else of the task's
    options. Without ``data`` it is the held-out split of the run. Nothing is read of the weights.

    Raises:
        UserError: if there is no such model, or nothing says the task or the data.
    """
    values: dict[str, Any] = {"predict": {"model": name or "-", "out": str(out), "answers": answers}, "task": {"options": {}}, "data": {},
                              "engine": {}}
    suggested = None
    if name is None:
        pass  # there are predictions already
    elif checkpoint := layout.checkpoint_of(name):
        values["predict"]["model"] = str(checkpoint.absolute())  # a run goes on meanwhile
        trained: Any = run_config(checkpoint)
        suggested = trained.task.name if isinstance(trained, FinetuneConfig) else OF_OBJECTIVES.get(trained.objective.name)
        values["data"]["max_length"] = trained.data.seq_len
        if isinstance(trained, FinetuneConfig) and task in (None, trained.task.name):
            values["task"]["options"] = trained.task.options
            values["data"] = trained.data.model_dump(mode="json", exclude={"train", "validation", "test"} if data else None)
            values["predict"]["split"] = "train" if data else "test" if trained.data.test else "validation"
    else:
        config, _ = model_and_tokenizer(name)
        architecture = (config.architectures or [""])[0]
        suggested = next((found for end, found in SUGGESTED.items() if architecture.endswith(end)), None)
        values["data"]["max_length"] = min(512, getattr(config, "max_position_embeddings", 514) - first_position(config))
        if (said := getattr(config, "hfscale", None)) and task in (None, said["task"]["name"]):  # an export of ours
            suggested, values["task"]["options"] = said["task"]["name"], said["task"]["options"]
            values["data"]["max_length"] = said["max_length"]
    values["task"]["name"] = task or suggested
    if values["task"]["name"] is None:
        raise ConfigError("nothing says what this model is for", where="--task", value=name, remedy=f"name the task: {', '.join(TASKS)}")
    if data or "train" not in values["data"]:
        values["data"]["train"] = data or ""
    sections = [f"{'' if text.split('.')[0] in values else 'task.options.'}{text}" for text in overrides]
    return load_values(values, sections, schema=PredictConfig)


def run_config(checkpoint: Path) -> TrainConfig:
    """Return the config of the run that ``checkpoint`` is of, wherever the run lies now."""
    run_dir = checkpoint.resolve().parents[1]
    moved = [f"run.root={json.dumps(str(run_dir.parent))}", f"run.name={json.dumps(run_dir.name)}"]
    return load_config(run_dir / "config.yaml", moved).config
