"""A model by name, whatever kind of place that is: a run, one of its checkpoints, an export, a transformers folder, a hub name."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import transformers
from safetensors import SafetensorError
from tokenizers import processors
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from hfscale.checkpoint import layout
from hfscale.checkpoint.weights import WeightsReader, open_weights
from hfscale.config.finetune import FinetuneConfig, PredictConfig
from hfscale.config.load import load_config, load_values
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.dist.group import default_device
from hfscale.errors import CheckpointError, ConfigError
from hfscale.hub import local_folder
from hfscale.jobs.check import model_needs, skeleton
from hfscale.jobs.material import tokenizer_folder
from hfscale.models.build import check_model_config, first_position
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

    def model(self) -> PreTrainedModel:
        """Return the model with its weights, on the CPU, in evaluation mode."""
        dtype = self.skeleton.dtype
        state = {name: self.reader.read(name).to(dtype) for name in self.reader.names()}
        return type(self.skeleton).from_pretrained(None, config=self.skeleton.config, state_dict=state, dtype=dtype).eval()


def open_run(name: str) -> RunModel | None:
    """Return the checkpoint that ``name`` stands for (of a run: its newest), or None if it is nothing of ours.

    Raises:
        CheckpointError: if it is a run without a checkpoint, or one whose files do not match its manifest.
    """
    disable_progress_bar()
    if (checkpoint := layout.checkpoint_of(name)) is None:
        return None
    reader = open_weights(checkpoint)  # damaged ones are refused: silently taking an older one would be a lie
    config = run_config(checkpoint)
    tokenizer = load_tokenizer(tokenizer_folder(config, None))
    state = json.loads((checkpoint / layout.STATE).read_text("utf-8"))
    setting = Setting(seq_len=config.data.seq_len, tokenizer=tokenizer, facts=state.get("facts", {}))
    if isinstance(config, FinetuneConfig):
        objective: Objective = load_task(config.task, setting)
    else:
        assert isinstance(config, RunConfig)
        objective = load_objective(config.objective, setting)
    model_config = check_model_config(**model_needs(config, tokenizer, checkpoint))
    return RunModel(config, objective, checkpoint, skeleton(config, model_config, objective.auto_model), reader, tokenizer)


def open_task(config: PredictConfig) -> tuple[PreTrainedModel, Task]:
    """Return the model that predicts, on the GPU if there is one, and its task.

    Raises:
        UserError: if there is no such model, or it has no head for the task.
    """
    kind, name = task_class(config.task.name), config.predict.model
    options = check_options(kind.Options, config.task.options, where="task.options")
    if run := open_run(name):
        model, tokenizer, facts = run.model(), run.tokenizer, run.objective.setting.facts
        framed(tokenizer, run.objective.frame, model.config)  # as an export of it would have it
        wanted = kind(options, Setting(seq_len=config.data.max_length, tokenizer=tokenizer)).auto_model
        if wanted == "AutoModel":
            model = cast("PreTrainedModel", model.base_model)
        elif run.objective.auto_model != wanted:
            raise _no_head(wanted, name, type(model).__name__)
    else:
        folder = local_folder(name, where="MODEL", weights=True, remedy="name a run, a checkpoint, an export, a transformers folder")
        tokenizer, facts = load_tokenizer(folder), {}
        wanted = kind(options, Setting(seq_len=config.data.max_length, tokenizer=tokenizer)).auto_model
        try:
            model, found = getattr(transformers, wanted).from_pretrained(folder, output_loading_info=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError("no model for this task here", where=name, value=str(error).splitlines()[0],
                                  remedy=f"name a run, a checkpoint, an export, or a folder that {wanted} loads") from error
        if wanted != "AutoModel" and found["missing_keys"]:
            raise _no_head(wanted, name, sorted(found["missing_keys"])[:4])
    facts = facts or kind.known(model.config)
    task = kind(options, Setting(seq_len=config.data.max_length, tokenizer=tokenizer, facts=facts, model_config=model.config))
    return model.eval().to(default_device()), task  # type: ignore[arg-type]


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
OF_OBJECTIVES = {"clm": "text_generation", "mlm": "fill_mask", "contrastive": "feature_extraction"}


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
    values: dict[str, Any] = {"predict": {"model": name or "-", "out": str(out), "answers": answers}, "task": {"options": {}}, "data": {}}
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
